//! Outputs that several threads write at the same time, each its own part.

use std::marker::PhantomData;
use std::ops::Range;

use super::pool::Pool;

/// A part of a matrix that one task may write: some rows and columns.
pub struct Tile<'a> {
    /// The first element of the matrix.
    matrix: *mut f32,
    stride: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    owner: PhantomData<&'a mut [f32]>,
}

impl Tile<'_> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Which of the matrix's columns these are.
    pub fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// An element: rows are counted from the tile's first, columns from the matrix's.
    #[inline(always)]
    pub fn at(&mut self, row: usize, column: usize) -> &mut f32 {
        assert!(row < self.rows.len() && self.columns.contains(&column));
        // SAFETY: `grid` has checked that rows and columns lie within the matrix, and gives no element to two tiles.
        unsafe { &mut *self.matrix.add((self.rows.start + row) * self.stride + column) }
    }

    /// A row of the tile, rows being counted from its first.
    #[inline(always)]
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows.len());
        let start = (self.rows.start + row) * self.stride + self.columns.start;
        // SAFETY: as in `at`.
        unsafe { std::slice::from_raw_parts_mut(self.matrix.add(start), self.columns.len()) }
    }
}

/// Something that threads may have a pointer to.
struct Pointer<T>(*mut T);

// SAFETY: `grid` and `each` give every thread elements of its own.
unsafe impl<T: Send> Sync for Pointer<T> {}

impl<T> Pointer<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

/// Cuts a matrix into tiles and writes them on all threads: `write(group, tile)` gets the rows from `bounds[group]` to
/// `bounds[group + 1]` and at most `width` columns. `bounds` ascends; nothing is called for groups without rows.
pub fn grid(
    pool: &Pool,
    matrix: &mut [f32],
    stride: usize,
    bounds: &[usize],
    width: usize,
    write: &(dyn Fn(usize, Tile<'_>) + Sync),
) {
    let (stride, width) = (stride.max(1), width.max(1));
    assert!(bounds.is_sorted() && bounds.last().copied().unwrap_or(0) <= matrix.len() / stride);
    let groups: Vec<usize> = (1..bounds.len()).filter(|&group| bounds[group - 1] < bounds[group]).collect();
    let parts = stride.div_ceil(width);
    let matrix = Pointer(matrix.as_mut_ptr());
    pool.run(groups.len() * parts, &|task| {
        let group = groups[task / parts] - 1;
        let start = task % parts * width;
        let tile = Tile {
            matrix: matrix.get(),
            stride,
            rows: bounds[group]..bounds[group + 1],
            columns: start..stride.min(start + width),
            owner: PhantomData,
        };
        write(group, tile);
    });
}

/// Writes equally long parts of a slice on all threads.
pub fn each<T: Send>(pool: &Pool, slice: &mut [T], length: usize, write: &(dyn Fn(usize, &mut [T]) + Sync)) {
    let length = length.max(1);
    let parts = slice.len() / length;
    let pointer = Pointer(slice.as_mut_ptr());
    pool.run(parts, &|part| {
        // SAFETY: the parts lie within the slice, and each is given to one task only.
        let part_of_slice =
            unsafe { std::slice::from_raw_parts_mut(pointer.get().add(part * length), length) };
        write(part, part_of_slice);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_a_matrix_once() {
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            let mut matrix = vec![0.0; 7 * 10];
            grid(&pool, &mut matrix, 10, &[0, 2, 2, 6], 4, &|group, mut tile| {
                for row in 0..tile.rows() {
                    for column in tile.columns() {
                        *tile.at(row, column) += (group + 1) as f32;
                    }
                    tile.row(row).iter_mut().for_each(|value| *value += 10.0);
                }
            });
            let value = |row: usize| [11.0, 11.0, 13.0, 13.0, 13.0, 13.0, 0.0][row];
            let expected: Vec<f32> = (0..70).map(|index| value(index / 10)).collect();
            assert_eq!(matrix, expected);
        }
    }

    #[test]
    #[should_panic]
    fn an_element_of_another_tile_is_out_of_reach() {
        let mut matrix = vec![0.0; 8];
        grid(&Pool::new(1), &mut matrix, 4, &[0, 2], 2, &|_, mut tile| *tile.at(0, tile.columns().end) = 1.0);
    }

    #[test]
    fn parts_of_a_slice_are_written_once() {
        let mut slice = vec![0; 10];
        each(&Pool::new(2), &mut slice, 3, &|part, values| {
            values.iter_mut().for_each(|value| *value += part + 1)
        });
        assert_eq!(slice, [1, 1, 1, 2, 2, 2, 3, 3, 3, 0]);
    }
}
