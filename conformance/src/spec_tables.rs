//! The tables of the specification that are generated from the code, so that the two cannot drift apart.
//!
//! A generated block stands between two comment lines, in any Markdown file of `spec/`:
//!
//! ```text
//! <!-- generated: NAME -->
//! …
//! <!-- end generated -->
//! ```
//!
//! | name | what |
//! |---|---|
//! | `head` | the fields of the first 148 bytes |
//! | `head-20b` | those bytes of the released 20b model, annotated |
//! | `special-tokens` | the special tokens and what the o200k vocabulary stores for each |
//! | `o200k-regex` | the splitting pattern |
//! | `tensors` | what the weights consist of, in order |
//! | `mxfp4-codes` | the values of the codes |
//! | `rules` | the index of rules |

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use binrw::BinWrite;
use formats::Rule;
use formats::checkpoint::config::Config;
use formats::model_bin::header::{
    HEAD_DIM, HEAD_LEN, Head, LAYOUT_UUID, MAGIC, MODEL_UUID, ModelHeader, NUM_ACTIVE_EXPERTS,
    TOKENIZER_UUID, TokenizerHeader,
};
use formats::model_bin::layout::{FOLLOW, Weights};
use formats::model_bin::section::{Field, FieldType, head_fields};
use formats::model_bin::tensors::{Dims, TensorKind};
use formats::mxfp4::CODES;
use formats::vocabulary::{O200K_REGEX, SPECIAL_TOKENS, Vocabulary};

const BEGIN: &str = "<!-- generated: ";
const BEGIN_END: &str = " -->";
const END: &str = "<!-- end generated -->";

/// The config of the released 20b model in the original layout.
const CONFIG_20B: &str = r#"{
    "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088,
    "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
    "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1, "rope_ntk_beta": 32
}"#;

/// The table of this name in Markdown, ending with a line break; `None` where there is none.
pub fn render(name: &str) -> Option<String> {
    match name {
        "head" => Some(head()),
        "head-20b" => head_20b(),
        "special-tokens" => Some(special_tokens()),
        "o200k-regex" => Some(format!("```text\n{O200K_REGEX}\n```\n")),
        "tensors" => tensors(),
        "mxfp4-codes" => Some(mxfp4_codes()),
        "rules" => Some(rules()),
        _ => None,
    }
}

/// `text` with every generated block made anew.
///
/// # Errors
/// A block whose name is unknown, or that does not end before the next one begins.
pub fn update(text: &str) -> Result<String> {
    let mut updated = String::with_capacity(text.len());
    let mut lines = text.split_inclusive('\n');
    while let Some(line) = lines.next() {
        updated += line;
        let Some(name) = line.trim_end().strip_prefix(BEGIN).and_then(|rest| rest.strip_suffix(BEGIN_END))
        else {
            continue;
        };
        updated += &render(name).with_context(|| format!("no generated table is called {name}"))?;
        match lines.find(|line| line.starts_with(END) || line.starts_with(BEGIN)) {
            Some(end) if end.starts_with(END) => updated += end,
            _ => bail!("the generated block {name} does not end with {END}"),
        }
    }
    Ok(updated)
}

/// Updates every Markdown file of `spec/` in the repository at `repo_root`; returns those that changed.
///
/// # Errors
/// See [`update`]; a file that cannot be read or written.
pub fn bless(repo_root: &Path) -> Result<Vec<PathBuf>> {
    let folder = repo_root.join("spec");
    let mut changed = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let updated = update(&text).with_context(|| path.display().to_string())?;
        if updated != text {
            fs::write(&path, updated).with_context(|| path.display().to_string())?;
            changed.push(path);
        }
    }
    changed.sort();
    Ok(changed)
}

/// A Markdown table. Cells must not hold line breaks; bars in them are escaped.
fn table(columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let line = |cells: Vec<String>| {
        let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let titles = line(columns.iter().map(|&title| title.into()).collect());
    let rule = format!("|{}\n", "---|".repeat(columns.len()));
    rows.into_iter().map(line).fold(titles + &rule, |table, row| table + &row)
}

fn code(text: impl std::fmt::Display) -> String {
    format!("`{text}`")
}

fn head() -> String {
    let constant = |field: &Field| match field.name {
        "magic" => code(MAGIC.escape_ascii()),
        "zero" => code(0),
        "model_uuid" => code(MODEL_UUID),
        "layout_uuid" => code(LAYOUT_UUID),
        "tokenizer_uuid" => code(TOKENIZER_UUID),
        "num_active_experts" => code(NUM_ACTIVE_EXPERTS),
        "head_dim" => code(HEAD_DIM),
        _ => String::new(),
    };
    table(
        &["offset", "size", "type", "section", "field", "always"],
        head_fields().map(|field| {
            let range = &field.range;
            vec![
                range.start.to_string(),
                (range.end - range.start).to_string(),
                field.ty.name().into(),
                field.section.into(),
                code(field.name),
                constant(&field),
            ]
        }),
    )
}

fn header_20b() -> Option<ModelHeader> {
    Config::parse(CONFIG_20B.as_bytes()).ok()?.header().ok()
}

fn head_20b() -> Option<String> {
    let vocabulary = Vocabulary::o200k();
    let sizes = TokenizerHeader {
        num_special_tokens: vocabulary.special_uuids.len().try_into().ok()?,
        num_text_tokens: vocabulary.num_text_tokens,
        regex_size: (vocabulary.regex.len() + 1).try_into().ok()?,
        tokens_size: vocabulary.records.len().try_into().ok()?,
    };
    let mut bytes = Cursor::new(Vec::new());
    Head::new(header_20b()?, sizes).write(&mut bytes).ok()?;
    let bytes = bytes.into_inner();

    let mut dump = format!("```text\n{:>6}  {:<47}  field\n", "offset", "bytes");
    let mut section = "";
    for field in head_fields() {
        if field.section != section {
            section = field.section;
            dump += &format!("-- {section}\n");
        }
        let content = bytes.get(field.range.start as usize..field.range.end as usize)?;
        let hex: Vec<String> = content.iter().map(|byte| format!("{byte:02x}")).collect();
        let word = content.first_chunk().map(|&bytes| u32::from_le_bytes(bytes))?;
        let value = match field.ty {
            FieldType::Text(_) => format!(" = \"{}\"", content.escape_ascii()),
            FieldType::U32 => format!(" = {word}"),
            FieldType::F32 => format!(" = {}", f32::from_bits(word)),
            FieldType::Uuid => String::new(),
        };
        dump += &format!("{:>6}  {:<47}  {}{value}\n", field.range.start, hex.join(" "), field.name);
    }
    dump += &format!("{HEAD_LEN:>6}  {:<47}  special tokens, {} UUIDs\n```\n", "…", sizes.num_special_tokens);
    Some(dump)
}

fn special_tokens() -> String {
    let o200k = Vocabulary::o200k();
    let rows = (o200k.num_text_tokens..).zip(&o200k.special_uuids).map(|(id, &stored)| {
        let token = SPECIAL_TOKENS.iter().find(|token| token.id == id);
        vec![
            id.to_string(),
            token.map_or_else(|| "reserved".into(), |token| code(token.name)),
            token.map_or_else(|| "none".into(), |token| code(token.uuid)),
            if token.is_some_and(|token| token.uuid == stored) { "the UUID" } else { "zero" }.into(),
        ]
    });
    table(&["o200k id", "token", "UUID", "stored with o200k"], rows)
}

/// Rows in the order in which the description itself lays the 20b model out.
fn tensors() -> Option<String> {
    let dims = Dims::new(&header_20b()?, Vocabulary::o200k().len()).ok()?;
    let weights = Weights::plan(dims, HEAD_LEN).ok()?;
    let mut boundaries: Vec<(TensorKind, Vec<u64>)> = Vec::new();
    for tensor in weights.tensors() {
        let kind = tensor.id.tensor.kind;
        match boundaries.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, aligns)) if aligns.contains(&tensor.align) => {}
            Some((_, aligns)) => aligns.push(tensor.align),
            None => boundaries.push((kind, vec![tensor.align])),
        }
    }
    let rows = boundaries.into_iter().map(|(kind, aligns)| {
        let per = match (kind.is_per_block(), kind.is_expert()) {
            (false, _) => "once",
            (true, false) => "each block",
            (true, true) => "each block, each expert",
        };
        let axes: Vec<&str> =
            kind.axes().iter().skip(kind.is_expert().into()).map(|axis| axis.symbol()).collect();
        let boundary = match *aligns {
            [FOLLOW] => "none".into(),
            [align] => align.to_string(),
            [first, rest] => format!("{first} for expert 0, else {rest}"),
            _ => return vec![],
        };
        vec![
            per.into(),
            code(kind.name()),
            kind.dtype().to_string(),
            format!("[{}]", axes.join(", ")),
            boundary,
        ]
    });
    Some(table(&["stored", "tensor", "dtype", "shape of a piece", "boundary"], rows))
}

fn mxfp4_codes() -> String {
    let (positive, negative) = CODES.split_at(8);
    let rows = (0u8..).zip(positive).zip((8u8..).zip(negative)).map(|((low, value), (high, minus))| {
        vec![
            format!("{low} `{low:04b}`"),
            value.to_string(),
            format!("{high} `{high:04b}`"),
            minus.to_string(),
        ]
    });
    table(&["code", "value", "code", "value"], rows)
}

fn rules() -> String {
    let rows = Rule::ALL.iter().map(|rule| {
        vec![code(rule.id()), rule.level().to_string(), rule.summary().into(), rule.advice().into()]
    });
    table(&["rule", "level", "demands", "when it is broken"], rows)
}

#[cfg(test)]
mod conformance {
    use super::*;

    #[test]
    fn generated_blocks_are_replaced_and_unknown_or_open_ones_refused() {
        let codes = render("mxfp4-codes").unwrap();
        let text = |content| format!("before\n{BEGIN}mxfp4-codes{BEGIN_END}\n{content}{END}\nafter\n");
        assert_eq!(update(&text("stale\n")).unwrap(), text(&codes));
        assert_eq!(update(&text(&codes)).unwrap(), text(&codes));
        assert!(update(&text("").replace("mxfp4", "mxfp5")).unwrap_err().to_string().contains("mxfp5-codes"));
        assert!(update(&text("").replace(END, "")).is_err());
    }

    /// The sizes that the specification states; computed from the genuine exporter's rules (facts.md).
    #[test]
    fn the_stated_sizes_are_those_of_the_layout() {
        let header_20b = header_20b().unwrap();
        let header_120b = ModelHeader { num_blocks: 36, num_experts: 128, ..header_20b };
        for (header, first, stride, end) in [
            (header_20b, 3_585_081_344, 423_575_552, 13_750_886_400),
            (header_120b, 4_244_553_728, 1_694_269_440, 65_238_253_568),
        ] {
            let dims = Dims::new(&header, 200_014).unwrap();
            let weights = Weights::plan(dims, 1_798_345).unwrap();
            let start = |block: usize| weights.experts[block].experts[0].mlp1_blocks.range.start;
            assert_eq!((start(0), start(1) - start(0), weights.end()), (first, stride, end));
        }
    }
}
