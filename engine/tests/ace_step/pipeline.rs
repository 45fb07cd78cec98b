//! Whole runs beside the original.

use crate::fixture::assert_part;

#[test]
fn runs_end_where_the_original_s_do() {
    assert_part("pipeline", 16);
}
