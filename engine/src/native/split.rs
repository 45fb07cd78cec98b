//! Matrices cut into tiles, which several threads write at the same time.

use std::ops::Range;

/// A part of a matrix that one task writes: some columns of some rows.
pub struct Tile<'a> {
    rows: Vec<&'a mut [f32]>,
    columns: Range<usize>,
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
        &mut self.rows[row][column - self.columns.start]
    }

    /// A row of the tile, rows being counted from its first.
    #[inline(always)]
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        self.rows[row]
    }
}

/// Cuts a matrix, `stride` columns wide, into tiles: those of group `g` have the rows from `bounds[g]` to `bounds[g + 1]`
/// and at most `width` columns. `bounds` ascends from 0; groups without rows have no tiles.
///
/// A tile is made when it is asked for, as a matrix of one row may have ten thousand.
pub fn grid<'a>(
    matrix: &'a mut [f32],
    stride: usize,
    bounds: &'a [usize],
    width: usize,
) -> impl Iterator<Item = (usize, Tile<'a>)> + Send {
    let mut rows = matrix.chunks_exact_mut(stride);
    bounds.windows(2).enumerate().flat_map(move |(group, bounds)| {
        let rows = rows.by_ref().take(bounds[1] - bounds[0]).collect();
        Tiles { rows, column: 0, width }.map(move |tile| (group, tile))
    })
}

/// The tiles of a group.
struct Tiles<'a> {
    /// What is left of each row.
    rows: Vec<&'a mut [f32]>,
    /// The column at which that begins.
    column: usize,
    width: usize,
}

impl<'a> Iterator for Tiles<'a> {
    type Item = Tile<'a>;

    fn next(&mut self) -> Option<Tile<'a>> {
        let width = self.rows.first()?.len().min(self.width);
        if width == 0 {
            return None;
        }
        let rows = self.rows.iter_mut().map(|row| row.split_off_mut(..width).unwrap_or_default()).collect();
        let columns = self.column..self.column + width;
        self.column = columns.end;
        Some(Tile { rows, columns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_the_rows_of_all_groups_once() {
        let mut matrix = vec![0.0; 7 * 10];
        let mut found = Vec::new();
        for (group, mut tile) in grid(&mut matrix, 10, &[0, 2, 2, 6], 4) {
            found.push((group, tile.rows(), tile.columns()));
            for row in 0..tile.rows() {
                for column in tile.columns() {
                    *tile.at(row, column) += (100 * group + 10 * row + column) as f32;
                }
                tile.row(row).iter_mut().for_each(|value| *value += 1000.0);
            }
        }
        let groups = [(0, 2), (2, 4)].into_iter();
        let expected =
            groups.flat_map(|(group, rows)| [0..4, 4..8, 8..10].map(|columns| (group, rows, columns)));
        assert_eq!(found, expected.collect::<Vec<_>>());
        let starts = [1000, 1010, 1200, 1210, 1220, 1230].into_iter();
        let mut expected: Vec<f32> =
            starts.flat_map(|start| (start..start + 10).map(|value| value as f32)).collect();
        expected.extend([0.0; 10]);
        assert_eq!(matrix, expected);
    }

    #[test]
    #[should_panic]
    fn an_element_of_another_tile_is_out_of_reach() {
        let mut matrix = vec![0.0; 8];
        for (_, mut tile) in grid(&mut matrix, 4, &[0, 2], 2) {
            *tile.at(0, tile.columns().end) = 1.0;
        }
    }
}
