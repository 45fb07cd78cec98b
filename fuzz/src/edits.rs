//! Changes to the valid small file: header words, runs of bytes at the borders of sections, its length.

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use formats::model_bin::section::{FieldType, SectionMap, head_fields};

use crate::tiny::{self, Tiny};

/// The values at which arithmetic breaks.
const EXTREMES: [u32; 16] = [
    0,
    1,
    3,
    4,
    31,
    32,
    64,
    0x7fff_ffe0,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffe0,
    0xffff_ffff,
    0x7f80_0000, // +∞ as an f32
    0xff80_0000, // −∞
    0x7fc0_0000, // NaN
    0x0000_4000,
];

/// What to change.
#[derive(Arbitrary, Debug)]
pub(crate) struct Edits {
    blocks: u8,
    words: Vec<(u8, Word)>,
    length: Length,
    patches: Vec<(Place, Vec<u8>)>,
}

#[derive(Arbitrary, Debug)]
enum Word {
    Extreme(u8),
    Any(u32),
    Add(i8),
}

/// A position: so many bytes from where a span starts.
#[derive(Arbitrary, Debug)]
struct Place {
    span: u16,
    offset: i8,
}

#[derive(Arbitrary, Debug)]
enum Length {
    Keep,
    Cut(Place),
    Append(u16, u8),
    Insert(Place, u16),
    Remove(Place, u16),
}

struct Base {
    bytes: Vec<u8>,
    /// Where its spans start.
    starts: Vec<usize>,
}

static BASES: LazyLock<[Base; 3]> = LazyLock::new(|| {
    [0, 1, 2].map(|blocks| {
        let bytes = tiny::model_bin(&Tiny::new(blocks)).expect("a model that can be written");
        let starts = SectionMap::read(&bytes).spans.iter().map(|span| span.range.start as usize).collect();
        Base { bytes, starts }
    })
});

impl Edits {
    /// The file after the changes.
    pub(crate) fn apply(&self) -> Vec<u8> {
        let base = &BASES[usize::from(self.blocks) % BASES.len()];
        let mut bytes = base.bytes.clone();
        let words: Vec<usize> = head_fields()
            .filter(|field| matches!(field.ty, FieldType::U32 | FieldType::F32))
            .map(|field| field.range.start as usize)
            .collect();
        for (index, word) in &self.words {
            let at = words[usize::from(*index) % words.len()];
            if let Some(old) = bytes[at..].first_chunk_mut::<4>() {
                *old = word.apply(u32::from_le_bytes(*old)).to_le_bytes();
            }
        }
        let at = |place: &Place| {
            let start = base.starts[usize::from(place.span) % base.starts.len()];
            start.saturating_add_signed(place.offset.into()).min(base.bytes.len())
        };
        for (place, patch) in &self.patches {
            let place = at(place);
            bytes[place..].iter_mut().zip(patch).for_each(|(byte, patch)| *byte = *patch);
        }
        match &self.length {
            Length::Keep => {}
            Length::Cut(place) => bytes.truncate(at(place)),
            Length::Append(count, byte) => bytes.resize(bytes.len() + usize::from(*count), *byte),
            Length::Insert(place, count) => {
                let place = at(place);
                bytes.splice(place..place, std::iter::repeat_n(0, (*count).into()));
            }
            Length::Remove(place, count) => {
                let place = at(place);
                bytes.drain(place..bytes.len().min(place + usize::from(*count)));
            }
        }
        bytes
    }
}

impl Word {
    fn apply(&self, old: u32) -> u32 {
        match *self {
            Word::Extreme(index) => EXTREMES[usize::from(index) % EXTREMES.len()],
            Word::Any(word) => word,
            Word::Add(difference) => old.wrapping_add_signed(difference.into()),
        }
    }
}

/// The files that an input stands for: itself, and the small one with the changes that it spells.
pub(crate) fn files(data: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let edited = crate::instructions::<Edits>(data).filter(|_| !data.starts_with(b"GPT-OSS "));
    std::iter::once(data.to_vec()).chain(edited.map(|edits| edits.apply()))
}
