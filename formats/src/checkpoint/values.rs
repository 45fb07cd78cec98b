//! Values that a writer must not meet half way through a file.

use half::bf16;
use rayon::prelude::*;

use super::folder::Part;
use super::shard::Shard;
use crate::mxfp4::MAX_SCALE;
use crate::progress::Progress;
use crate::rules::Rule;
use crate::violation::{Result, Violation};

/// Bytes that a thread reads at once.
const CHUNK: u64 = 4 << 20;
/// Failures that are listed of one tensor.
const LISTED: usize = 3;

/// What every element of a tensor must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Test {
    /// A byte up to [`MAX_SCALE`].
    Scale,
    /// A BF16 value that is no NaN.
    NotNan,
    /// A BF16 value that is finite.
    Finite,
}

impl Test {
    fn element_bytes(self) -> u64 {
        if self == Test::Scale { 1 } else { 2 }
    }

    /// Positions of the first elements that fail, and how many fail at all.
    fn failures(self, bytes: &[u8]) -> (Vec<usize>, u64) {
        fn of<T: Copy>(elements: &[T], fails: impl Fn(T) -> bool) -> (Vec<usize>, u64) {
            let count = elements.iter().map(|&element| u64::from(fails(element))).sum();
            let positions = match count {
                0 => Vec::new(),
                _ => (0..)
                    .zip(elements)
                    .filter(|(_, element)| fails(**element))
                    .map(|(at, _)| at)
                    .take(LISTED)
                    .collect(),
            };
            (positions, count)
        }
        let magnitude = |element: [u8; 2]| u16::from_le_bytes(element) & 0x7fff;
        match self {
            Test::Scale => of(bytes, |scale| scale > MAX_SCALE),
            Test::NotNan => of(bytes.as_chunks().0, |element| magnitude(element) > 0x7f80),
            Test::Finite => of(bytes.as_chunks().0, |element| magnitude(element) >= 0x7f80),
        }
    }
}

/// Applies each test to its tensor: one violation for each tensor that fails, in order.
pub(super) fn check<'a>(
    tests: &[(&'a Part, Test)],
    shard: impl Fn(&Part) -> Result<&'a Shard> + Sync,
    progress: &dyn Progress,
) -> Result<Vec<Violation>> {
    let len = |part: &Part| part.range.end - part.range.start;
    progress.begin("checking scales and weights", tests.iter().map(|(part, _)| len(part)).sum());
    let chunks: Vec<(usize, u64)> = (0..)
        .zip(tests)
        .flat_map(|(test, (part, _))| (0..len(part).div_ceil(CHUNK)).map(move |chunk| (test, chunk * CHUNK)))
        .collect();
    let failures = chunks
        .into_par_iter()
        .map_init(Vec::new, |buffer, (number, offset)| {
            let Some((part, test)) = tests.get(number) else {
                return Ok(None);
            };
            let bytes = CHUNK.min(len(part) - offset);
            buffer.resize(bytes as usize, 0);
            shard(part)?.read_at(buffer, part.range.start + offset)?;
            progress.advance(bytes);
            let (positions, count) = test.failures(buffer);
            let first = offset / test.element_bytes();
            let listed: Vec<(u64, [u8; 2])> = positions
                .into_iter()
                .map(|at| {
                    let byte = |at| buffer.get(at).copied().unwrap_or_default();
                    let start = at * test.element_bytes() as usize;
                    (first + at as u64, [byte(start), byte(start + 1)])
                })
                .collect();
            Ok((count > 0).then_some((number, listed, count)))
        })
        .filter_map(Result::transpose)
        .collect::<Result<Vec<_>>>()?;

    let mut violations = Vec::new();
    for chunks in failures.chunk_by(|(a, ..), (b, ..)| a == b) {
        let Some((part, test)) = chunks.first().and_then(|(number, ..)| tests.get(*number)) else {
            continue;
        };
        let listed: Vec<_> = chunks.iter().flat_map(|(_, listed, _)| listed).take(LISTED).copied().collect();
        let count = chunks.iter().map(|(.., count)| count).sum();
        violations.push(violation(*test, part, &shard(part)?.name, &listed, count));
    }
    Ok(violations)
}

/// The violation of a tensor with `count` failures, of which `listed` are the first: element and bytes. Its range is the
/// first one's.
pub(super) fn violation(
    test: Test,
    part: &Part,
    file: &str,
    listed: &[(u64, [u8; 2])],
    count: u64,
) -> Violation {
    let shown = listed.iter().map(|&(element, bytes)| {
        let at = position(&part.shape, element);
        match test {
            Test::Scale => format!("{} at element {at:?}", bytes[0]),
            Test::NotNan | Test::Finite => format!("{} at element {at:?}", bf16::from_le_bytes(bytes)),
        }
    });
    let mut found = shown.collect::<Vec<_>>().join(", ");
    if let more @ 1.. = count.saturating_sub(listed.len() as u64) {
        found += &format!(" and {more} more");
    }
    let (rule, needed) = match test {
        Test::Scale => (Rule::SourceScale, "at most 240"),
        Test::NotNan => (Rule::SourceNan, "no NaN"),
        Test::Finite => (Rule::SourceNan, "finite values, since MXFP4 has neither NaN nor infinity"),
    };
    let start = part.range.start + listed.first().map_or(0, |(element, _)| element * test.element_bytes());
    Violation {
        rule,
        section: file.into(),
        field: part.name.clone(),
        range: start..start + test.element_bytes(),
        found,
        needed: needed.into(),
    }
}

/// The indices of an element of a row-major tensor.
fn position(shape: &[u64], mut element: u64) -> Vec<u64> {
    let mut indices: Vec<u64> = shape
        .iter()
        .rev()
        .map(|&size| {
            let index = element % size.max(1);
            element /= size.max(1);
            index
        })
        .collect();
    indices.reverse();
    indices
}
