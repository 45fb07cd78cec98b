//! Checks a file against every rule that needs no checkpoint and lists all that it breaks.

use std::fmt;
use std::io::Cursor;
use std::ops::Range;

use binrw::BinRead;
use hashbrown::HashSet;
use rayon::prelude::*;
use serde::Serialize;

use super::header::{
    HEAD_DIM, Head, LAYOUT_UUID, MAGIC, MODEL_UUID, ModelHeader, NUM_ACTIVE_EXPERTS, TOKENIZER_UUID, Uuid,
};
use super::layout::{At, Blob, File, Padding, Prefix, Tensor, Weights};
use super::section::{header_field, weights_section};
use super::tensors::{Dtype, TensorKind};
use crate::progress::Progress;
use crate::rules::Rule;
use crate::violation::Violation;
use crate::vocabulary;

/// Longest regex that a file may hold, with its NUL (`TOK-REGEX-SIZE`).
pub const MAX_REGEX_SIZE: u32 = 65536;
/// Special tokens that a vocabulary may have (`TOK-COUNT`).
pub const MAX_SPECIAL_TOKENS: u32 = 65536;

/// Bytes that one thread checks at a time.
const CHUNK: usize = 8 << 20;

/// How much of a file is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Depth {
    /// Headers, tokenizer, paddings and length: milliseconds, however large the file.
    Structure,
    /// Every scale and every BF16 weight as well. (Any byte is a valid pair of MXFP4 codes.) Weights are only looked at
    /// where they end with the file: otherwise the header is wrong and none is where it should be.
    Full,
}

impl fmt::Display for Depth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Depth::Structure => "structure",
            Depth::Full => "full",
        })
    }
}

/// What a verification found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Length of the file in bytes.
    pub len: u64,
    /// How much was checked.
    pub depth: Depth,
    /// Every broken rule, one entry for a rule and field; the entry's `found` says how often.
    pub violations: Vec<Violation>,
    /// The sections, as far as their positions can be computed.
    pub file: Option<File>,
}

impl Report {
    /// Whether no MUST is broken.
    pub fn is_valid(&self) -> bool {
        !self.violations.iter().any(Violation::is_error)
    }
}

/// Verifies a whole file.
pub fn verify(bytes: &[u8], depth: Depth, progress: &dyn Progress) -> Report {
    let mut violations = Vec::new();
    let file = structure(bytes, &mut violations);
    // Where the weights do not end with the file, the header is wrong and no weight is where it should be.
    if let Some(file) = &file
        && depth == Depth::Full
        && file.weights.end() == bytes.len() as u64
    {
        values(bytes, file, progress, &mut violations);
    }
    Report { len: bytes.len() as u64, depth, violations, file }
}

/// The slice of `bytes` at a range that was read from it.
pub(crate) fn slice<'a>(bytes: &'a [u8], range: &Range<u64>) -> &'a [u8] {
    bytes.get(range.start as usize..range.end as usize).unwrap_or_default()
}

fn structure(bytes: &[u8], violations: &mut Vec<Violation>) -> Option<File> {
    let len = bytes.len() as u64;
    let mut reader = Cursor::new(bytes);
    let prefix = match Prefix::read_args(&mut reader, binrw::args! { len }) {
        Ok(prefix) => prefix,
        Err(error) => {
            // Too short for the prefix; say at least whether it is such a file at all.
            match Head::read(&mut Cursor::new(bytes)) {
                Ok(head) => check_head(&head, violations),
                Err(_) => check_magic(slice(bytes, &(0..12.min(len))), violations),
            }
            violations.push(read_violation(error, len));
            return None;
        }
    };
    violations.extend(check_prefix(bytes, &prefix));
    let weights = prefix.dims().and_then(|dims| Weights::read_args(&mut reader, At::start(dims, len)));
    let weights = match weights {
        Ok(weights) => weights,
        Err(error) => {
            let violation = read_violation(error, len);
            if !violations.iter().any(|known| known.rule == violation.rule && known.field == violation.field)
            {
                violations.push(violation);
            }
            return None;
        }
    };
    for tensor in weights.tensors() {
        check_padding(bytes, tensor, &tensor.padding, violations);
    }
    if weights.end() < len {
        violations.push(Violation {
            rule: Rule::Trailing,
            section: "trailing bytes".into(),
            field: "trailing bytes".into(),
            range: weights.end()..len,
            found: format!("{} bytes after the last section", len - weights.end()),
            needed: format!("a file of {} bytes", weights.end()),
        });
    }
    Some(File { prefix, weights })
}

/// The rules on everything before the weights; `bytes` starts with the prefix.
pub(super) fn check_prefix(bytes: &[u8], prefix: &Prefix) -> Vec<Violation> {
    let mut violations = Vec::new();
    check_head(&prefix.head, &mut violations);
    let vocabulary = header_field("num_special_tokens").start..prefix.text_tokens.range.end;
    if !is_o200k(bytes, &vocabulary) {
        check_special_tokens(bytes, prefix, &mut violations);
        check_regex(bytes, &prefix.regex, &mut violations);
        check_text_tokens(bytes, prefix, &mut violations);
        violations.push(Violation {
            rule: Rule::O200k,
            section: "tokenizer header".into(),
            field: "vocabulary".into(),
            range: vocabulary,
            found: format!("another vocabulary of {} tokens", prefix.num_tokens()),
            needed: "o200k_harmony's".into(),
        });
    }
    violations
}

/// The violation inside an error of the description. One place translates, since `binrw`'s own messages carry
/// neither section nor field.
pub fn read_violation(error: binrw::Error, len: u64) -> Violation {
    match error.custom_err::<Violation>() {
        Some(violation) => violation.clone(),
        None => Violation {
            rule: Rule::Truncated,
            section: "file".into(),
            field: "file".into(),
            range: 0..len,
            found: match error.root_cause() {
                binrw::Error::Io(io) => io.to_string(),
                _ => "a section that cannot be read".into(),
            },
            needed: "a readable file".into(),
        },
    }
}

struct HeadChecks<'a> {
    violations: &'a mut Vec<Violation>,
    section: &'static str,
}

impl HeadChecks<'_> {
    fn must(
        &mut self,
        holds: bool,
        rule: Rule,
        field: &str,
        found: impl fmt::Display,
        needed: impl Into<String>,
    ) {
        if !holds {
            self.violations.push(Violation {
                rule,
                section: self.section.into(),
                field: field.into(),
                range: header_field(field),
                found: found.to_string(),
                needed: needed.into(),
            });
        }
    }

    fn uuid(&mut self, rule: Rule, field: &str, found: Uuid, needed: Uuid) {
        self.must(found == needed, rule, field, found, needed.to_string());
    }

    fn positive(&mut self, rule: Rule, field: &str, value: f32) {
        self.must(value.is_finite() && value > 0.0, rule, field, value, "a finite number above 0");
    }
}

fn check_magic(found: &[u8], violations: &mut Vec<Violation>) {
    HeadChecks { violations, section: "file header" }.must(
        found == MAGIC,
        Rule::Magic,
        "magic",
        format!("\"{}\"", found.escape_ascii()),
        format!("\"{}\"", MAGIC.escape_ascii()),
    );
}

fn check_head(head: &Head, violations: &mut Vec<Violation>) {
    check_magic(&head.magic, violations);
    let mut file = HeadChecks { violations, section: "file header" };
    file.must(head.magic_zero == 0, Rule::MagicZero, "zero", format!("{:#010x}", head.magic_zero), "0");
    file.uuid(Rule::ModelUuid, "model_uuid", head.model_uuid, MODEL_UUID);
    violations.extend(check_model_header(&head.model));
    let mut layout = HeadChecks { violations, section: "layout header" };
    layout.uuid(Rule::LayoutUuid, "layout_uuid", head.layout_uuid, LAYOUT_UUID);
    let mut tokenizer = HeadChecks { violations, section: "tokenizer header" };
    tokenizer.uuid(Rule::TokenizerUuid, "tokenizer_uuid", head.tokenizer_uuid, TOKENIZER_UUID);
    let counts = head.tokenizer;
    let (text, special) = (counts.num_text_tokens, counts.num_special_tokens);
    tokenizer.must(
        text >= 1 && u64::from(text) + u64::from(special) <= super::tensors::MAX_TOKENS,
        Rule::TokenCount,
        "num_text_tokens",
        format!("{text} (and {special} special tokens)"),
        "1 to 2^24 tokens in all",
    );
    tokenizer.must(
        special <= MAX_SPECIAL_TOKENS,
        Rule::TokenCount,
        "num_special_tokens",
        special,
        format!("at most {MAX_SPECIAL_TOKENS}"),
    );
    tokenizer.must(
        (2..=MAX_REGEX_SIZE).contains(&counts.regex_size),
        Rule::RegexSize,
        "regex_size",
        counts.regex_size,
        format!("2 to {MAX_REGEX_SIZE}"),
    );
}

/// The `HDR-*` rules on a model header, wherever it comes from; ranges are those that its fields have in a file.
pub fn check_model_header(header: &ModelHeader) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut check = HeadChecks { violations: &mut violations, section: "model header" };
    let h = header;
    check.must(h.context_length >= 1, Rule::ContextLength, "context_length", h.context_length, "at least 1");
    check.must(
        h.num_experts >= h.num_active_experts,
        Rule::NumExperts,
        "num_experts",
        h.num_experts,
        format!("at least num_active_experts ({})", h.num_active_experts),
    );
    check.must(
        h.num_active_experts == NUM_ACTIVE_EXPERTS,
        Rule::NumActiveExperts,
        "num_active_experts",
        h.num_active_experts,
        NUM_ACTIVE_EXPERTS.to_string(),
    );
    for (rule, field, value) in
        [(Rule::EmbeddingDim, "embedding_dim", h.embedding_dim), (Rule::MlpDim, "mlp_dim", h.mlp_dim)]
    {
        check.must(value > 0 && value % 32 == 0, rule, field, value, "a positive multiple of 32");
    }
    check.positive(Rule::SwigluLimit, "swiglu_limit", h.swiglu_limit);
    check.must(h.head_dim == HEAD_DIM, Rule::HeadDim, "head_dim", h.head_dim, HEAD_DIM.to_string());
    check.must(h.num_heads >= 1, Rule::NumHeads, "num_heads", h.num_heads, "at least 1");
    check.must(
        h.num_kv_heads >= 1 && h.num_heads.is_multiple_of(h.num_kv_heads),
        Rule::NumKvHeads,
        "num_kv_heads",
        h.num_kv_heads,
        format!("a divisor of num_heads ({})", h.num_heads),
    );
    check.must(
        h.attention_window >= 1,
        Rule::AttentionWindow,
        "attention_window",
        h.attention_window,
        "at least 1",
    );
    check.must(
        h.rope_theta.is_finite() && h.rope_theta > 1.0,
        Rule::RopeTheta,
        "rope_theta",
        h.rope_theta,
        "a finite number above 1",
    );
    check.positive(Rule::InterpolationScale, "interpolation_scale", h.interpolation_scale);
    check.must(h.yarn_offset.is_finite(), Rule::YarnOffset, "yarn_offset", h.yarn_offset, "a finite number");
    check.positive(Rule::YarnScale, "yarn_scale", h.yarn_scale);
    check.positive(Rule::YarnMultiplier, "yarn_multiplier", h.yarn_multiplier);
    check.positive(Rule::RmsnormEpsilon, "rmsnorm_epsilon", h.rmsnorm_epsilon);
    violations
}

/// Collects what one rule has against the entries of a list: the first is shown, the rest counted.
#[derive(Default)]
struct First {
    count: u64,
    first: Option<(Range<u64>, String)>,
}

impl First {
    fn add(&mut self, range: Range<u64>, found: impl FnOnce() -> String) {
        self.count += 1;
        if self.first.is_none() {
            self.first = Some((range, found()));
        }
    }

    fn report(self, rule: Rule, section: &str, field: &str, needed: &str, violations: &mut Vec<Violation>) {
        if let Some((range, found)) = self.first {
            let more = if self.count > 1 { format!(" and {} more", self.count - 1) } else { String::new() };
            violations.push(Violation {
                rule,
                section: section.into(),
                field: field.into(),
                range,
                found: found + &more,
                needed: needed.into(),
            });
        }
    }
}

fn check_special_tokens(bytes: &[u8], prefix: &Prefix, violations: &mut Vec<Violation>) {
    let range = &prefix.special_uuids.range;
    let first_id = u64::from(prefix.head.tokenizer.num_text_tokens);
    let (mut unknown, mut duplicate) = (First::default(), First::default());
    let mut seen = HashSet::new();
    for (index, uuid) in (0..).zip(slice(bytes, range).as_chunks::<16>().0.iter().copied().map(Uuid)) {
        if uuid == Uuid::default() {
            continue;
        }
        let (start, id) = (range.start + index * 16, first_id + index);
        if vocabulary::SpecialToken::from_uuid(uuid).is_none() {
            unknown.add(start..start + 16, || format!("{uuid} for token {id}"));
        }
        if !seen.insert(uuid) {
            duplicate.add(start..start + 16, || format!("{uuid} again, for token {id}"));
        }
    }
    let section = prefix.special_uuids.id.section();
    unknown.report(
        Rule::SpecialUnknown,
        section,
        "uuid",
        "zero or a UUID of the specification's table",
        violations,
    );
    duplicate.report(Rule::SpecialDuplicate, section, "uuid", "each UUID once", violations);
}

fn check_regex(bytes: &[u8], regex: &Blob, violations: &mut Vec<Violation>) {
    let content = slice(bytes, &regex.range);
    let mut report = |rule, range, found: String, needed: &str| {
        violations.push(Violation {
            rule,
            section: regex.id.section().into(),
            field: "regex".into(),
            range,
            found,
            needed: needed.into(),
        });
    };
    let nul = content.iter().position(|&byte| byte == 0);
    let pattern = match nul {
        Some(at) if at + 1 == content.len() => &content[..at],
        Some(at) => {
            let at = regex.range.start + at as u64;
            report(Rule::RegexNul, at..at + 1, format!("a NUL at byte {at}"), "one NUL, as the last byte");
            &content[..0]
        }
        None => {
            report(Rule::RegexNul, regex.range.clone(), "no NUL".into(), "one NUL, as the last byte");
            content
        }
    };
    if let Err(error) = std::str::from_utf8(pattern) {
        let at = regex.range.start + error.valid_up_to() as u64;
        let end = error.error_len().map_or(regex.range.end, |len| at + len as u64);
        report(Rule::RegexUtf8, at..end, format!("an invalid sequence at byte {at}"), "UTF-8");
    }
}

fn check_text_tokens(bytes: &[u8], prefix: &Prefix, violations: &mut Vec<Violation>) {
    let blob = &prefix.text_tokens;
    let section = blob.id.section();
    let records = slice(bytes, &blob.range);
    let count = prefix.head.tokenizer.num_text_tokens;
    // Seeded at random: the tokens are the file's, and with a known hash they could be chosen to collide.
    let mut seen = HashSet::new();
    let (mut empty, mut duplicate) = (First::default(), First::default());
    let mut single = [false; 256];
    let mut position = 0;
    let mut id = 0u64;
    let mut complaint = None;
    while position < records.len() {
        let start = blob.range.start + position as u64;
        let Some((&length, rest)) = records[position..].split_first_chunk::<2>() else {
            complaint = Some((
                start..blob.range.end,
                format!("1 byte left where the length of token {id} should be"),
            ));
            break;
        };
        let length = usize::from(u16::from_le_bytes(length));
        let Some(token) = rest.get(..length) else {
            complaint = Some((
                start..blob.range.end,
                format!("token {id} of {length} bytes with {} left", rest.len()),
            ));
            break;
        };
        let range = start..start + 2 + length as u64;
        match token {
            [] => empty.add(range, || format!("token {id}")),
            token => {
                if let [byte] = token {
                    single[usize::from(*byte)] = true;
                }
                if !seen.insert(token) {
                    duplicate.add(range, || format!("token {id} (\"{}\") again", token.escape_ascii()));
                }
            }
        }
        position += 2 + length;
        id += 1;
    }
    if complaint.is_none() && id != u64::from(count) {
        complaint = Some((blob.range.clone(), format!("{id} records")));
    }
    if let Some((range, found)) = complaint {
        violations.push(Violation {
            rule: Rule::TokenRecords,
            section: section.into(),
            field: "records".into(),
            range,
            found,
            needed: format!("{count} records that fill {} bytes", records.len()),
        });
    }
    empty.report(Rule::TokenEmpty, section, "records", "at least 1 byte", violations);
    duplicate.report(Rule::TokenDuplicate, section, "records", "distinct tokens", violations);
    let missing: Vec<usize> = (0..256).filter(|&byte| !single[byte]).collect();
    if let Some(first) = missing.first() {
        violations.push(Violation {
            rule: Rule::TokenBytes,
            section: section.into(),
            field: "records".into(),
            range: blob.range.clone(),
            found: format!("no token for byte {first:#04x} ({} of 256 missing)", missing.len()),
            needed: "a token for each single byte".into(),
        });
    }
}

/// Length and BLAKE3 of bytes [132, 1798345) of every export with the o200k vocabulary: the tokenizer's counts and
/// sizes, UUIDs, regex and tokens. A test derives it from the vocabulary itself.
pub(crate) const O200K_SECTION: (u64, &str) =
    (1_798_213, "07d2f7b2009567967d664d70f0fd918436acbf3d6a276e7d62f003c71250dac4");

fn is_o200k(bytes: &[u8], section: &Range<u64>) -> bool {
    section.end - section.start == O200K_SECTION.0
        && blake3::hash(slice(bytes, section)).to_hex().as_str() == O200K_SECTION.1
}

fn check_padding(bytes: &[u8], tensor: &Tensor, padding: &Padding, violations: &mut Vec<Violation>) {
    if let Some(range) = &padding.nonzero {
        let rule = if tensor.align == super::layout::PAGE { Rule::PaddingPage } else { Rule::PaddingTensor };
        let first = slice(bytes, range).first().copied().unwrap_or_default();
        violations.push(Violation {
            rule,
            section: weights_section(tensor.id.tensor),
            field: format!("padding before {}", tensor.id),
            range: range.clone(),
            found: format!("{first:#04x}"),
            needed: "zero bytes".into(),
        });
    }
}

fn values(bytes: &[u8], file: &File, progress: &dyn Progress, violations: &mut Vec<Violation>) {
    let checked =
        |tensor: &&Tensor| !matches!(tensor.id.tensor.kind, TensorKind::Mlp1Blocks | TensorKind::Mlp2Blocks);
    let tensors: Vec<&Tensor> = file.weights.tensors().filter(checked).collect();
    progress
        .begin("verifying values", tensors.iter().map(|tensor| tensor.range.end - tensor.range.start).sum());
    let found: Vec<Vec<Violation>> = tensors
        .par_iter()
        .map(|tensor| {
            let chunks = slice(bytes, &tensor.range).par_chunks(CHUNK).enumerate();
            let found = chunks.map(|(index, chunk)| {
                let bad =
                    BadValues::of(chunk, tensor.range.start + (index * CHUNK) as u64, tensor.id.tensor.kind);
                progress.advance(chunk.len() as u64);
                bad
            });
            found.reduce(BadValues::default, BadValues::and).report(tensor)
        })
        .collect();
    violations.extend(found.into_iter().flatten());
}

/// Elements of a tensor that break a value rule.
#[derive(Default)]
struct BadValues {
    scales: Elements,
    nans: Elements,
    infinities: Elements,
}

/// How many elements, and where the first of them is.
#[derive(Default)]
struct Elements {
    count: u64,
    first: Option<(u64, u16)>,
}

impl Elements {
    fn add(&mut self, position: u64, bits: u16) {
        self.count += 1;
        self.first.get_or_insert((position, bits));
    }

    fn and(self, later: Elements) -> Elements {
        Elements { count: self.count + later.count, first: self.first.or(later.first) }
    }
}

impl BadValues {
    /// The bad elements among those that start at byte `position` of the file.
    fn of(chunk: &[u8], position: u64, kind: TensorKind) -> BadValues {
        let mut bad = BadValues::default();
        if kind.is_scales() {
            if !scales_in_range(chunk) {
                let stored = (position..).zip(chunk).filter(|&(_, &stored)| !scales_in_range(&[stored]));
                stored.for_each(|(position, &stored)| bad.scales.add(position, stored.into()));
            }
        } else if kind.dtype() == Dtype::Bf16 && !bf16_all_finite(chunk) {
            for (position, &[low, high]) in (position..).step_by(2).zip(chunk.as_chunks::<2>().0) {
                let bits = u16::from_le_bytes([low, high]);
                match bits & 0x7fff {
                    ..0x7f80 => {}
                    // A sink of −∞ is a sink that takes nothing.
                    0x7f80 if kind == TensorKind::Sinks && bits == 0xff80 => {}
                    0x7f80 => bad.infinities.add(position, bits),
                    _ => bad.nans.add(position, bits),
                }
            }
        }
        bad
    }

    fn and(self, later: BadValues) -> BadValues {
        BadValues {
            scales: self.scales.and(later.scales),
            nans: self.nans.and(later.nans),
            infinities: self.infinities.and(later.infinities),
        }
    }

    fn report(self, tensor: &Tensor) -> Vec<Violation> {
        let rows = [
            (Rule::ScaleRange, self.scales, "stored scales from 14 to 254"),
            (Rule::Nan, self.nans, "no NaN"),
            (Rule::Infinite, self.infinities, "finite values"),
        ];
        let size = tensor.id.tensor.kind.dtype().size();
        rows.into_iter()
            .filter_map(|(rule, elements, needed)| {
                let (position, bits) = elements.first?;
                let index = (position - tensor.range.start) / size;
                let value = if size == 1 { bits.to_string() } else { format!("{bits:#06x}") };
                Some(Violation {
                    rule,
                    section: weights_section(tensor.id.tensor),
                    field: tensor.id.to_string(),
                    range: position..position + size,
                    found: format!("{value} at element {index} ({} such)", elements.count),
                    needed: needed.into(),
                })
            })
            .collect()
    }
}

/// Whether every stored scale lies in 14..=254.
pub fn scales_in_range(stored: &[u8]) -> bool {
    stored.iter().map(|scale| scale.wrapping_sub(14)).fold(0, u8::max) <= 240
}

/// Whether no BF16 element, little-endian, is infinite or NaN.
pub fn bf16_all_finite(bytes: &[u8]) -> bool {
    let exponents = bytes.as_chunks::<2>().0.iter().map(|&pair| i16::from_le_bytes(pair) & 0x7fff);
    // A maximum of i16 is one instruction on every SIMD unit, x86-64's baseline included.
    exponents.fold(0, i16::max) < 0x7f80
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocabulary::Vocabulary;

    #[test]
    fn the_o200k_section_is_the_bundled_vocabulary() {
        let o200k = Vocabulary::o200k();
        let mut section = Vec::new();
        for word in [
            o200k.special_uuids.len() as u32,
            o200k.num_text_tokens,
            o200k.regex.len() as u32 + 1,
            o200k.records.len() as u32,
        ] {
            section.extend(word.to_le_bytes());
        }
        o200k.special_uuids.iter().for_each(|uuid| section.extend(uuid.0));
        section.extend(o200k.regex.bytes().chain([0]));
        section.extend(&o200k.records);
        assert_eq!(section.len() as u64, O200K_SECTION.0);
        assert_eq!(blake3::hash(&section).to_hex().as_str(), O200K_SECTION.1);
    }
}
