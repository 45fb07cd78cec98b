//! The orders in which products take their inputs.
//!
//! Weights stay as the file has them, and unpacking them leaves their values in an order of its own. Inputs, which are
//! few, are put into the same order once, so that products need no shuffles.
//!
//! ```text
//! bf16   two in each 32-bit lane        groups of 32:  0 2 4 … 30 | 1 3 5 … 31
//! MXFP4  eight in each 32-bit lane      groups of 128: 0 8 … 120 | 4 12 … 124 | 1 9 … | 5 … | 2 … | 6 … | 3 … | 7 …
//! ```

/// Values of a group of bf16, and of a [`Group`].
pub const DENSE: usize = 32;
/// Values of a group of MXFP4: four blocks.
pub const PACKED: usize = 128;

/// 32 inputs in the order of a product.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group(pub [f32; DENSE]);

impl Group {
    /// All zero.
    pub const ZERO: Group = Group([0.0; DENSE]);
}

/// Groups that a vector for products with bf16 takes.
pub const fn dense_groups(columns: usize) -> usize {
    columns.div_ceil(DENSE)
}

/// Groups that a vector for products with decoded MXFP4 takes.
pub const fn packed_groups(columns: usize) -> usize {
    columns.div_ceil(PACKED) * (PACKED / DENSE)
}

/// The place of value `index` in a vector for products with decoded MXFP4.
pub const fn packed_index(index: usize) -> usize {
    let (lane, value) = (index % PACKED / 8, index % 8);
    index / PACKED * PACKED + (value % 4 * 2 + value / 4) * 16 + lane
}

/// Puts a vector into the order of bf16; what is beyond its end is zero.
pub fn to_dense(x: &[f32], out: &mut [Group]) {
    for (values, group) in x.chunks(DENSE).zip(out) {
        if let Ok(values) = <&[f32; DENSE]>::try_from(values) {
            for lane in 0..DENSE / 2 {
                group.0[lane] = values[2 * lane];
                group.0[DENSE / 2 + lane] = values[2 * lane + 1];
            }
        } else {
            *group = Group::ZERO;
            for (index, value) in values.iter().enumerate() {
                group.0[index % 2 * (DENSE / 2) + index / 2] = *value;
            }
        }
    }
}

/// Puts a vector into the order of decoded MXFP4; what is beyond its end is zero.
pub fn to_packed(x: &[f32], out: &mut [Group]) {
    let out = out.as_chunks_mut::<{ PACKED / DENSE }>().0;
    for (values, groups) in x.chunks(PACKED).zip(out) {
        if values.len() < PACKED {
            groups.fill(Group::ZERO);
        }
        for (index, value) in values.iter().enumerate() {
            let place = packed_index(index);
            groups[place / DENSE].0[place % DENSE] = *value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_permutations_that_end_in_zeros() {
        for columns in [2, 32, 34, 96, 128, 160, 320] {
            let x: Vec<f32> = (1..=columns).map(|value| value as f32).collect();
            let mut dense = vec![Group([f32::NAN; DENSE]); dense_groups(columns)];
            to_dense(&x, &mut dense);
            let mut packed = vec![Group([f32::NAN; DENSE]); packed_groups(columns)];
            to_packed(&x, &mut packed);
            for groups in [dense, packed] {
                let mut values: Vec<f32> = groups.iter().flat_map(|group| group.0).collect();
                values.sort_by(f32::total_cmp);
                let padding = values.len() - columns;
                assert!(values[..padding].iter().all(|&value| value == 0.0));
                assert_eq!(values[padding..], x);
            }
        }
    }
}
