//! The invalid cases: for every rule at least one input that breaks it, each a small change to a valid one, with the
//! rule and the bytes that a verifier has to name. Positions come from [`crate::oracle`], values from the
//! specification; nothing here asks `formats` what it would say.

use std::ops::Range;
use std::path::Path;

use formats::Rule;
use half::bf16;

use crate::checkpoint::{self, Checkpoint};
use crate::oracle::{Oracle, oracle};

/// The valid file that cases change: 2 blocks, 4 experts, hidden 32, intermediate 64, heads 2/1, 300 tokens.
pub const BASE: &[u8] = include_bytes!("../../fixtures/model-bin/ordinary.bin");

/// What is given to the implementation under test.
pub enum Input {
    /// A file to verify.
    File(Vec<u8>),
    /// A file to verify against the base checkpoint: the rules are about what its writer did.
    Against(Vec<u8>),
    /// A checkpoint to export, made by a change to the base checkpoint.
    Checkpoint(fn(&mut Checkpoint)),
}

/// One invalid input.
pub struct Case {
    /// Unique, kebab-case.
    pub name: String,
    /// Why this is wrong, in the words of the specification's reasons.
    pub rationale: &'static str,
    /// The rule that it breaks. Others may be broken as a consequence.
    pub rule: Rule,
    /// The bytes that have to be named; empty for checkpoints, where the field is compared instead.
    pub range: Range<u64>,
    /// The field, tensor or config key that has to be named.
    pub field: String,
    /// The input.
    pub input: Input,
}

impl Case {
    /// The base file that [`Input::Against`] is compared with.
    pub fn write_base_checkpoint(folder: &Path) -> anyhow::Result<()> {
        Checkpoint::base()?.write(folder)
    }
}

/// Every case.
pub fn all() -> Vec<Case> {
    let mut cases = Cases { oracle: oracle(BASE), cases: Vec::new() };
    cases.file_header();
    cases.model_header();
    cases.tokenizer();
    cases.weights();
    cases.writer();
    cases.cases.extend(checkpoint::cases());
    cases.cases
}

struct Cases {
    oracle: Oracle,
    cases: Vec<Case>,
}

impl Cases {
    fn add(
        &mut self,
        name: &str,
        rule: Rule,
        range: Range<u64>,
        field: &str,
        rationale: &'static str,
        input: Input,
    ) {
        self.cases.push(Case { name: name.into(), rationale, rule, range, field: field.into(), input });
    }

    /// A file that differs from the base in some bytes; the violation is reported at `range`.
    fn patched(
        &mut self,
        name: &str,
        rule: Rule,
        range: Range<u64>,
        field: &str,
        rationale: &'static str,
        patches: &[(u64, &[u8])],
    ) {
        self.add(name, rule, range, field, rationale, Input::File(patch(patches)));
    }

    /// A file in which one word of the headers has another value.
    fn word(&mut self, rule: Rule, offset: u64, field: &str, value: u32, rationale: &'static str) {
        let name = format!("{}-{value:#x}", field.replace('_', "-"));
        self.patched(&name, rule, offset..offset + 4, field, rationale, &[(offset, &value.to_le_bytes())]);
    }

    fn tensor(&self, name: &str) -> Range<u64> {
        self.oracle.tensors[name].clone()
    }

    fn file_header(&mut self) {
        self.patched(
            "magic-of-a-later-version",
            Rule::Magic,
            0..12,
            "magic",
            "a version is part of the magic, so a reader of 1.0 cannot know the layout of 1.1",
            &[(9, b"1.1")],
        );
        self.word(Rule::MagicZero, 12, "zero", 1, "the word is reserved");
        self.patched(
            "model-of-another-kind",
            Rule::ModelUuid,
            16..32,
            "model_uuid",
            "the header's fields are those of GPT-OSS only under its UUID",
            &[(16, &[0; 16])],
        );
        self.patched(
            "layout-for-other-hardware",
            Rule::LayoutUuid,
            100..116,
            "layout_uuid",
            "orders and paddings are those of the Apple GPU layout only under its UUID",
            &[(115, &[0x6e])],
        );
        self.patched(
            "tokenizer-of-another-kind",
            Rule::TokenizerUuid,
            116..132,
            "tokenizer_uuid",
            "the section's fields are those of tiktoken vocabularies only under its UUID",
            &[(116, &[0xff])],
        );
        let len = self.oracle.len;
        let last = self.tensor("block.1.mlp.mlp2_bias[3]");
        self.add(
            "last-byte-missing",
            Rule::Truncated,
            last,
            "block.1.mlp.mlp2_bias[3]",
            "a failing export leaves a cut file behind, and the genuine runtime loads it",
            Input::File(BASE[..BASE.len() - 1].to_vec()),
        );
        self.add(
            "cut-in-the-model-header",
            Rule::Truncated,
            48..52,
            "embedding_dim",
            "the genuine runtime spins for ever on a file that ends in its header",
            Input::File(BASE[..50].to_vec()),
        );
        self.add(
            "empty-file",
            Rule::Truncated,
            0..12,
            "magic",
            "nothing is not a file of this format",
            Input::File(Vec::new()),
        );
        let mut longer = BASE.to_vec();
        longer.push(0);
        self.add(
            "one-byte-more",
            Rule::Trailing,
            len..len + 1,
            "trailing bytes",
            "bytes that no section owns are a place to hide things, or a sign of a wrong header",
            Input::File(longer),
        );
    }

    fn model_header(&mut self) {
        let [nan, infinity] = [f32::NAN, f32::INFINITY].map(f32::to_bits);
        let negative = (-1.0f32).to_bits();
        self.word(Rule::ContextLength, 32, "context_length", 0, "a model without context cannot run");
        self.word(Rule::NumExperts, 40, "num_experts", 3, "the router selects four experts");
        self.word(Rule::NumActiveExperts, 44, "num_active_experts", 5, "the kernels select four");
        self.word(Rule::NumActiveExperts, 44, "num_active_experts", 0, "the kernels select four");
        self.word(Rule::EmbeddingDim, 48, "embedding_dim", 33, "an MXFP4 block holds 32 values of one row");
        self.word(Rule::EmbeddingDim, 48, "embedding_dim", 0, "a residual stream has a width");
        self.word(Rule::MlpDim, 52, "mlp_dim", 48, "an MXFP4 block holds 32 values of one row");
        self.word(Rule::MlpDim, 52, "mlp_dim", 0, "an expert has a width");
        self.word(Rule::HeadDim, 60, "head_dim", 128, "the interleaving of Q and K is defined for 64");
        self.word(Rule::NumHeads, 64, "num_heads", 0, "attention has at least one head");
        self.word(Rule::NumKvHeads, 68, "num_kv_heads", 0, "heads are divided by it");
        self.word(Rule::NumKvHeads, 68, "num_kv_heads", 3, "query heads are shared out evenly");
        self.word(Rule::AttentionWindow, 72, "attention_window", 0, "the window counts the token itself");
        for (rule, offset, field, values) in [
            (Rule::SwigluLimit, 56, "swiglu_limit", &[0, nan, infinity, negative][..]),
            (Rule::RopeTheta, 76, "rope_theta", &[0, nan, infinity, negative, 1f32.to_bits()]),
            (Rule::InterpolationScale, 80, "interpolation_scale", &[0, nan, infinity, negative]),
            (Rule::YarnOffset, 84, "yarn_offset", &[nan, infinity]),
            (Rule::YarnScale, 88, "yarn_scale", &[0, nan, infinity, negative]),
            (Rule::YarnMultiplier, 92, "yarn_multiplier", &[0, nan, infinity, negative]),
            (Rule::RmsnormEpsilon, 96, "rmsnorm_epsilon", &[0, nan, infinity, negative]),
        ] {
            for &value in values {
                self.word(
                    rule,
                    offset,
                    field,
                    value,
                    "a computation with this number ends in NaN or in nonsense",
                );
            }
        }
        self.patched(
            "sizes-beyond-2-63",
            Rule::Overflow,
            36..40,
            "num_blocks",
            "products that wrap have been the way into every parser of model files",
            &[
                (36, &u32::MAX.to_le_bytes()),
                (40, &u32::MAX.to_le_bytes()),
                (48, &0xffff_ffe0u32.to_le_bytes()),
            ],
        );
    }

    fn tokenizer(&mut self) {
        self.word(Rule::TokenCount, 136, "num_text_tokens", 0, "a model without tokens has no embedding");
        self.word(Rule::TokenCount, 136, "num_text_tokens", u32::MAX, "counts drive allocations");
        self.patched(
            "too-many-special-tokens",
            Rule::TokenCount,
            132..136,
            "num_special_tokens",
            "counts drive allocations",
            // Room for the UUIDs, so that the count and not the length of the file is at fault.
            &[(132, &65537u32.to_le_bytes()), (148 + 65537 * 16, &[0])],
        );
        self.word(Rule::RegexSize, 140, "regex_size", 1, "an empty pattern splits nothing");
        let regex = self.oracle.regex.clone();
        let last = regex.end - 1;
        self.patched(
            "regex-without-nul",
            Rule::RegexNul,
            regex.clone(),
            "regex",
            "the genuine runtime reads it as a C string",
            &[(last, b"?")],
        );
        self.patched(
            "regex-with-a-nul-inside",
            Rule::RegexNul,
            regex.start + 3..regex.start + 4,
            "regex",
            "the genuine runtime would stop there, another reader would not",
            &[(regex.start + 3, &[0])],
        );
        self.patched(
            "regex-not-utf8",
            Rule::RegexUtf8,
            regex.start + 2..regex.start + 3,
            "regex",
            "the pattern is text",
            &[(regex.start + 2, &[0xff])],
        );
        // Tokens 0 to 255 are the single bytes: three bytes a record.
        let records = self.oracle.text_tokens.clone();
        let record = |id: u64| records.start + 3 * id;
        self.patched(
            "token-runs-over",
            Rule::TokenRecords,
            record(7)..records.end,
            "records",
            "the genuine runtime gets lengths of 128 and more wrong; a reader must not read past the section",
            &[(record(7), &u16::MAX.to_le_bytes())],
        );
        self.word_as(
            "fewer-records-than-counted",
            Rule::TokenRecords,
            136,
            285,
            records.clone(),
            "records",
            "ids and embedding rows would shift",
        );
        self.patched(
            "token-empty",
            Rule::TokenEmpty,
            record(9)..record(9) + 2,
            "records",
            "no text encodes to it",
            &[(record(9), &0u16.to_le_bytes())],
        );
        self.patched(
            "token-twice",
            Rule::TokenDuplicate,
            record(66)..record(67),
            "records",
            "two ids for the same bytes",
            &[(record(66) + 2, b"A")],
        );
        self.patched(
            "byte-missing",
            Rule::TokenBytes,
            records.clone(),
            "records",
            "text with that byte cannot be encoded",
            &[(record(66) + 2, b"A")],
        );
        let uuids = self.oracle.special_uuids.clone();
        let slot = |index: u64| uuids.start + 16 * index..uuids.start + 16 * index + 16;
        self.patched(
            "special-token-unknown",
            Rule::SpecialUnknown,
            slot(3),
            "uuid",
            "nobody could know what the token means",
            &[(slot(3).start, &[1; 16])],
        );
        let other = BASE[slot(2).start as usize..slot(2).end as usize].to_vec();
        self.patched(
            "special-token-twice",
            Rule::SpecialDuplicate,
            slot(5),
            "uuid",
            "the runtime would take whichever it meets last",
            &[(slot(5).start, &other)],
        );
        // A note, not an error: the base itself has another vocabulary.
        self.patched(
            "vocabulary-not-o200k",
            Rule::O200k,
            132..records.end,
            "vocabulary",
            "Harmony conversations need o200k's ids",
            &[],
        );
    }

    fn weights(&mut self) {
        let page = self.oracle.paddings["embedding.weight"].clone();
        self.patched(
            "something-in-the-page-padding",
            Rule::PaddingPage,
            page.end - 3..page.end - 1,
            "padding before embedding.weight",
            "padding is a place to hide things, or a section that starts elsewhere",
            &[(page.end - 3, &[1, 0xff])],
        );
        let page = self.oracle.paddings["block.1.mlp.mlp1_weight.blocks[0]"].clone();
        self.patched(
            "something-before-the-experts",
            Rule::PaddingPage,
            page.start..page.start + 1,
            "padding before block.1.mlp.mlp1_weight.blocks[0]",
            "padding is a place to hide things, or a section that starts elsewhere",
            &[(page.start, &[7])],
        );
        let padding = self.oracle.paddings["block.0.attn.out.weight"].clone();
        self.patched(
            "something-after-the-sinks",
            Rule::PaddingTensor,
            padding.start + 1..padding.start + 2,
            "padding before block.0.attn.out.weight",
            "padding is a place to hide things, or a tensor that starts elsewhere",
            &[(padding.start + 1, &[0x80])],
        );
        let scales = self.tensor("block.1.mlp.mlp1_weight.scales[2]");
        for (name, stored) in [("scale-wrapped", 13u8), ("scale-infinite", 255), ("scale-zero", 0)] {
            self.patched(
                name,
                Rule::ScaleRange,
                scales.start + 5..scales.start + 6,
                "block.1.mlp.mlp1_weight.scales[2]",
                "the kernels read the byte as the exponent of an f32",
                &[(scales.start + 5, &[stored])],
            );
        }
        for (name, tensor) in [
            ("nan-in-the-embedding", "embedding.weight"),
            ("nan-in-qkv", "block.0.attn.qkv.weight"),
            ("nan-in-an-expert-bias", "block.1.mlp.mlp2_bias[1]"),
        ] {
            let at = self.tensor(tensor).start + 6;
            let nan = 0xff81u16.to_le_bytes();
            let why = "one NaN reaches every logit, and its payload is not reproducible";
            self.patched(name, Rule::Nan, at..at + 2, tensor, why, &[(at, &nan)]);
        }
        let at = self.tensor("norm.scale").start + 2;
        self.patched(
            "infinite-norm",
            Rule::Infinite,
            at..at + 2,
            "norm.scale",
            "infinity times zero is NaN",
            &[(at, &bf16::INFINITY.to_le_bytes())],
        );
    }

    fn writer(&mut self) {
        let against = |patches: &[(u64, &[u8])]| Input::Against(patch(patches));
        let rounded_twice = u32::from_le_bytes(*b"\xb6\xa4\x5e\xbf") + 1;
        self.add(
            "yarn-offset-off-by-one-ulp",
            Rule::WriterHeader,
            84..88,
            "yarn_offset",
            "computing in f32 differs in the last bit",
            against(&[(84, &rounded_twice.to_le_bytes())]),
        );
        let uuids = self.oracle.special_uuids.clone();
        self.add(
            "message-in-the-wrong-slot",
            Rule::WriterTokenizer,
            uuids.start..self.oracle.text_tokens.end,
            "vocabulary",
            "id 200008 has two names in the genuine script; <|message|> is the one that counts",
            against(&[(uuids.start + 10 * 16, &[0; 16])]),
        );
        let qkv = self.tensor("block.0.attn.qkv.weight");
        let row_bytes = 64;
        let row = |index: u64| {
            (qkv.start + index * row_bytes) as usize..(qkv.start + (index + 1) * row_bytes) as usize
        };
        // Rows 0 and 1 of the first Q head are checkpoint rows 0 and 32.
        let (first, second) = (BASE[row(0)].to_vec(), BASE[row(1)].to_vec());
        self.add(
            "qkv-rows-swapped",
            Rule::WriterQkvOrder,
            self.differing(&[(row(0).start as u64, &second), (row(1).start as u64, &first)]),
            "block.0.attn.qkv.weight",
            "the kernels rotate neighbouring rows",
            against(&[(row(0).start as u64, &second), (row(1).start as u64, &first)]),
        );
        // Row 0 unscaled: every value twice as large.
        let doubled: Vec<u8> = BASE[row(0)]
            .chunks(2)
            .flat_map(|pair| {
                bf16::from_f32(bf16::from_le_bytes([pair[0], pair[1]]).to_f32() * 2.0).to_le_bytes()
            })
            .collect();
        self.add(
            "q-not-scaled",
            Rule::WriterQkvScale,
            self.differing(&[(row(0).start as u64, &doubled)]),
            "block.0.attn.qkv.weight",
            "the kernels leave out the factor 1/8 that Q and K carry",
            against(&[(row(0).start as u64, &doubled)]),
        );
        let bias = self.tensor("block.1.attn.qkv.bias");
        // A K bias rounded the wrong way: one unit in the last place.
        let at = bias.start + 2 * (2 * 64 + 5);
        let wrong = (BASE[at as usize] ^ 1).to_le_bytes();
        self.add(
            "k-rounded-the-wrong-way",
            Rule::WriterQkvScale,
            at..at + 1,
            "block.1.attn.qkv.bias",
            "to nearest even, subnormals and −0 kept",
            against(&[(at, &wrong)]),
        );
        let scales = self.tensor("block.0.mlp.mlp2_weight.scales[3]");
        let plain: Vec<u8> =
            BASE[scales.start as usize..scales.end as usize].iter().map(|scale| scale - 1).collect();
        self.add(
            "scales-plus-13",
            Rule::WriterScale,
            scales.clone(),
            "block.0.mlp.mlp2_weight.scales[3]",
            "the kernels' codes are scaled by 2^-14",
            against(&[(scales.start, &plain)]),
        );
        let [gate, norm] = ["block.1.mlp.gate.bias", "block.1.mlp.norm.scale"].map(|name| self.tensor(name));
        let zero = vec![0; (gate.end - gate.start) as usize];
        self.add(
            "router-bias-missing",
            Rule::WriterCopy,
            self.differing(&[(gate.start, &zero)]),
            "block.1.mlp.gate.bias",
            "every other tensor is copied",
            against(&[(gate.start, &zero)]),
        );
        let flipped = [BASE[norm.start as usize] ^ 1];
        self.add(
            "norm-off-by-one-ulp",
            Rule::WriterCopy,
            norm.start..norm.start + 1,
            "block.1.mlp.norm.scale",
            "every other tensor is copied",
            against(&[(norm.start, &flipped)]),
        );
        // The embedding from row 1 on: what a writer does that skips a row.
        let embedding = self.tensor("embedding.weight");
        let shifted = BASE[embedding.start as usize + 64..embedding.end as usize].to_vec();
        self.add(
            "embedding-from-row-1",
            Rule::WriterRows,
            self.differing(&[(embedding.start, &shifted)]),
            "embedding.weight",
            "row r belongs to token r",
            against(&[(embedding.start, &shifted)]),
        );
    }

    #[expect(clippy::too_many_arguments, reason = "the columns of a table")]
    fn word_as(
        &mut self,
        name: &str,
        rule: Rule,
        offset: u64,
        value: u32,
        range: Range<u64>,
        field: &str,
        rationale: &'static str,
    ) {
        self.patched(name, rule, range, field, rationale, &[(offset, &value.to_le_bytes())]);
    }

    /// From the first to the last byte in which a patched file differs from the base.
    fn differing(&self, patches: &[(u64, &[u8])]) -> Range<u64> {
        let patched = patch(patches);
        let differs = |&at: &usize| BASE[at] != patched[at];
        let first = (0..BASE.len()).find(differs).expect("a patch that changes something");
        let last = (0..BASE.len()).rfind(differs).expect("a patch that changes something");
        first as u64..last as u64 + 1
    }
}

/// The base file with some bytes replaced; longer where a patch lies behind its end.
fn patch(patches: &[(u64, &[u8])]) -> Vec<u8> {
    let mut bytes = BASE.to_vec();
    for &(offset, patch) in patches {
        let range = offset as usize..offset as usize + patch.len();
        if bytes.len() < range.end {
            bytes.resize(range.end, 0);
        }
        bytes[range].copy_from_slice(patch);
    }
    bytes
}
