//! The rules of `spec/model-bin.md`, one variant each.
//!
//! A rule id is the only name a violation has: the specification, error messages, the conformance cases and
//! `modelbin verify --json` all use it. The table below is the single list; the specification's index of
//! rules is generated from it and a test holds the two together.

use std::fmt;

/// Where a rule can be checked, and what breaking it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// Needs the file's headers, paddings and length only. A file that breaks one cannot be read.
    Structure,
    /// Needs every weight to be read.
    Value,
    /// Needs the checkpoint that the file was made from (`modelbin verify --against`).
    Writer,
    /// About the input of a writer: a checkpoint that breaks one is refused before anything is written.
    Source,
    /// A SHOULD: reported, but the file is still valid.
    Note,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Structure => "structure",
            Level::Value => "value",
            Level::Writer => "writer",
            Level::Source => "source",
            Level::Note => "note",
        })
    }
}

macro_rules! rules {
    ($( $(#[doc = $doc:literal])+ $variant:ident = $id:literal, $level:ident, $advice:literal; )+) => {
        /// A rule of the specification.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Rule { $( $(#[doc = $doc])+ $variant, )+ }

        impl Rule {
            /// Every rule, in the order of the specification.
            pub const ALL: &'static [Rule] = &[ $( Rule::$variant, )+ ];

            /// The identifier that the specification and every message use.
            pub fn id(self) -> &'static str { match self { $( Rule::$variant => $id, )+ } }

            /// Where the rule can be checked.
            pub fn level(self) -> Level { match self { $( Rule::$variant => Level::$level, )+ } }

            /// What the rule demands, in one sentence.
            pub fn summary(self) -> &'static str {
                match self { $( Rule::$variant => concat!($( $doc ),+).trim_ascii(), )+ }
            }

            /// What somebody who meets a violation can do about it.
            pub fn advice(self) -> &'static str { match self { $( Rule::$variant => $advice, )+ } }

            /// The rule with this identifier.
            pub fn from_id(id: &str) -> Option<Rule> { match id { $( $id => Some(Rule::$variant), )+ _ => None } }
        }
    };
}

rules! {
    /// The file starts with the 12 bytes `GPT-OSS v1.0`.
    Magic = "FILE-MAGIC", Structure, "this is not a model.bin, or its first bytes were overwritten; look at what produced it";
    /// The u32 after the magic is zero.
    MagicZero = "FILE-MAGIC-ZERO", Structure, "write 0; another value may mean a later version of the format";
    /// The model UUID is the one of GPT-OSS.
    ModelUuid = "FILE-MODEL-UUID", Structure, "the file holds another kind of model; use the reader made for it";
    /// The layout UUID is the one of the Apple GPU layout.
    LayoutUuid = "FILE-LAYOUT-UUID", Structure, "the weights are laid out for other hardware; export the checkpoint again";
    /// The tokenizer UUID is the one of the tiktoken layout.
    TokenizerUuid = "FILE-TOKENIZER-UUID", Structure, "the tokenizer section has another layout; export the checkpoint again";
    /// Every section lies within the file whole.
    Truncated = "FILE-TRUNCATED", Structure, "the file was cut short (full disk, broken download, failed export); fetch or export it again";
    /// The file ends with the last byte of the last section.
    Trailing = "FILE-TRAILING", Structure, "cut the file after the last section, or check the header: the counts may be too small";

    /// `context_length` is at least 1.
    ContextLength = "HDR-CONTEXT-LENGTH", Structure, "export again from a config with initial_context_length × rope_scaling_factor ≥ 1";
    /// `num_experts` is at least `num_active_experts`.
    NumExperts = "HDR-NUM-EXPERTS", Structure, "a router that selects 4 experts needs at least 4; check num_experts in the config";
    /// `num_active_experts` is 4.
    NumActiveExperts = "HDR-NUM-ACTIVE-EXPERTS", Structure, "the exporter writes the constant 4 and the kernels select 4; check experts_per_token in the config";
    /// `embedding_dim` is a positive multiple of 32.
    EmbeddingDim = "HDR-EMBEDDING-DIM", Structure, "MXFP4 blocks hold 32 values of a row; such a model has no model.bin form";
    /// `mlp_dim` is a positive multiple of 32.
    MlpDim = "HDR-MLP-DIM", Structure, "MXFP4 blocks hold 32 values of a row; such a model has no model.bin form";
    /// `swiglu_limit` is finite and positive.
    SwigluLimit = "HDR-SWIGLU-LIMIT", Structure, "use the config's swiglu_limit; the exporter's default is 7.0";
    /// `head_dim` is 64.
    HeadDim = "HDR-HEAD-DIM", Structure, "the Q and K interleaving is defined for heads of 64; such a model has no model.bin form";
    /// `num_heads` is at least 1.
    NumHeads = "HDR-NUM-HEADS", Structure, "check num_attention_heads in the config";
    /// `num_kv_heads` is at least 1 and divides `num_heads`.
    NumKvHeads = "HDR-NUM-KV-HEADS", Structure, "check num_key_value_heads in the config: each group of query heads shares one";
    /// `attention_window` is at least 1.
    AttentionWindow = "HDR-ATTENTION-WINDOW", Structure, "the window counts the token itself; check sliding_window in the config";
    /// `rope_theta` is finite and greater than 1.
    RopeTheta = "HDR-ROPE-THETA", Structure, "check rope_theta in the config (150000 for the released models)";
    /// `interpolation_scale` is finite and positive.
    InterpolationScale = "HDR-INTERPOLATION-SCALE", Structure, "it is 1 / rope_scaling_factor; check that factor";
    /// `yarn_offset` is finite.
    YarnOffset = "HDR-YARN-OFFSET", Structure, "check rope_ntk_alpha, rope_ntk_beta and initial_context_length in the config";
    /// `yarn_scale` is finite and positive.
    YarnScale = "HDR-YARN-SCALE", Structure, "rope_ntk_alpha must be below rope_ntk_beta in the config";
    /// `yarn_multiplier` is finite and positive.
    YarnMultiplier = "HDR-YARN-MULTIPLIER", Structure, "it is 0.1·ln(rope_scaling_factor) + 1; check that factor";
    /// `rmsnorm_epsilon` is finite and positive.
    RmsnormEpsilon = "HDR-RMSNORM-EPSILON", Structure, "the exporter writes 1e-5";
    /// The sizes that the header implies stay within 2^63 bytes.
    Overflow = "HDR-OVERFLOW", Structure, "no real model is this large: the header is damaged or hostile";

    /// `num_text_tokens` is at least 1, `num_special_tokens` at most 65536, and both together at most 2^24.
    TokenCount = "TOK-COUNT", Structure, "the tokenizer header is damaged; export the checkpoint again";
    /// `regex_size` is between 2 and 65536.
    RegexSize = "TOK-REGEX-SIZE", Structure, "the size counts the pattern and one NUL; an empty pattern splits nothing";
    /// The regex ends with its only NUL byte.
    RegexNul = "TOK-REGEX-NUL", Structure, "write the pattern, then one zero byte, and count both in regex_size";
    /// The regex is UTF-8.
    RegexUtf8 = "TOK-REGEX-UTF8", Structure, "write the pattern as UTF-8";
    /// The text token records fill `tokens_size` exactly, `num_text_tokens` of them.
    TokenRecords = "TOK-RECORDS", Structure, "a length runs over or the counts disagree; export the checkpoint again";
    /// No text token is empty.
    TokenEmpty = "TOK-EMPTY", Structure, "an empty token can never be produced; remove it from the vocabulary";
    /// Text tokens are distinct.
    TokenDuplicate = "TOK-DUPLICATE", Structure, "two ids with the same bytes make encoding ambiguous; remove one from the vocabulary";
    /// Each of the 256 single bytes is a text token.
    TokenBytes = "TOK-BYTES", Structure, "without all single bytes some texts cannot be encoded; add them to the vocabulary";
    /// A special token's UUID is zero or one of the ten that the specification lists.
    SpecialUnknown = "TOK-SPECIAL-UNKNOWN", Structure, "use a UUID of the specification's table, or zero for a reserved slot";
    /// No special token's UUID but zero occurs twice.
    SpecialDuplicate = "TOK-SPECIAL-DUPLICATE", Structure, "each special token has one id; zero the other slot";
    /// The tokenizer section should be the one of o200k_harmony, byte for byte.
    O200k = "TOK-O200K", Note, "valid, but OpenAI's runtime and Harmony expect the o200k vocabulary; export with it for chat";

    /// Padding to a 16384-byte boundary consists of zero bytes.
    PaddingPage = "PAD-PAGE", Structure, "zero these bytes, or find out what hides there; a section may start elsewhere than the header says";
    /// Padding to a 16-byte boundary consists of zero bytes.
    PaddingTensor = "PAD-TENSOR", Structure, "zero these bytes, or find out what hides there; a tensor may start elsewhere than the header says";

    /// A stored MXFP4 scale lies between 14 and 254.
    ScaleRange = "VAL-SCALE", Value, "0 to 13 arise when scale + 14 wraps, 255 is read as infinity; export from a checkpoint with scales ≤ 240";
    /// No BF16 weight is NaN.
    Nan = "VAL-NAN", Value, "the checkpoint was damaged or diverged in training; NaN payloads are not reproducible either";
    /// BF16 weights should be finite.
    Infinite = "VAL-INFINITE", Note, "an infinite weight usually means a damaged checkpoint; only a sink of −∞ has a meaning (no sink)";

    /// Header values are computed from the config in binary64 and rounded once to binary32.
    WriterHeader = "WR-HEADER", Writer, "compute in f64, round at the end, and keep the order of operations of the specification";
    /// The tokenizer section holds the vocabulary that was asked for, in rank order.
    WriterTokenizer = "WR-TOKENIZER", Writer, "write the tokens by rank and the special UUIDs by id, as the specification lists them";
    /// Q and K rows of each head are interleaved: stored row 2i + j is checkpoint row 32j + i.
    WriterQkvOrder = "WR-QKV-ORDER", Writer, "reorder (2, 32) to (32, 2) within each Q and K head; leave V alone";
    /// Q is multiplied by 0.5 and K by 0.25 in BF16, rounding to nearest even and keeping subnormals and −0.
    WriterQkvScale = "WR-QKV-SCALE", Writer, "multiply in f32 and round to BF16 to nearest even, without flushing subnormals; leave V alone";
    /// A stored MXFP4 scale is the checkpoint's plus 14.
    WriterScale = "WR-SCALE", Writer, "add 14 to each scale byte; leave the blocks alone";
    /// Every other tensor is the checkpoint's, bit for bit, in the specified order.
    WriterCopy = "WR-COPY", Writer, "copy the tensor unchanged; check the order of tensors and of experts";
    /// Embedding and unembedding hold the first rows of the checkpoint's, one for each token.
    WriterRows = "WR-ROWS", Writer, "write exactly num_text_tokens + num_special_tokens rows, starting with row 0";

    /// The checkpoint's files can be read: each shard is a well-formed SafeTensors (or GGUF) file inside the folder.
    SourceContainer = "SRC-CONTAINER", Source, "fetch the file again; list the shards that the index names";
    /// No tensor name occurs twice in the checkpoint.
    SourceDuplicate = "SRC-DUPLICATE", Source, "keep one of the files: the genuine exporter silently takes whichever comes last in the folder";
    /// Every tensor that the model needs is there.
    SourceMissing = "SRC-MISSING", Source, "fetch the missing shard, or check num_hidden_layers in the config";
    /// Every tensor has the dtype of the layout: BF16, and U8 for blocks and scales.
    SourceDtype = "SRC-DTYPE", Source, "convert the tensor; the format has no flag for another dtype, so it would be misread";
    /// Every tensor has the shape that the config implies.
    SourceShape = "SRC-SHAPE", Source, "config and tensors disagree; take both from the same checkpoint";
    /// The config has every key that the header needs, of the right type and in range.
    SourceConfig = "SRC-CONFIG", Source, "add or correct the key in config.json";
    /// hidden_size and intermediate_size are positive multiples of 32.
    SourceMultiple = "SRC-MULTIPLE-32", Source, "MXFP4 blocks hold 32 values of a row; such a model has no model.bin form";
    /// There are at least 4 experts.
    SourceExperts = "SRC-EXPERTS", Source, "the runtime selects 4 experts; such a model has no model.bin form";
    /// experts_per_token is 4.
    SourceActiveExperts = "SRC-ACTIVE-EXPERTS", Source, "the exporter writes the constant 4, so another number would be lost; such a model has no model.bin form";
    /// The embedding has at least one row for each token.
    SourceRows = "SRC-ROWS", Source, "use the vocabulary that the checkpoint was trained with, or pad its embedding";
    /// No MXFP4 scale is above 240.
    SourceScale = "SRC-SCALE", Source, "scale + 14 would become infinity or wrap; quantise the tensor again";
    /// No BF16 value is NaN.
    SourceNan = "SRC-NAN", Source, "the checkpoint was damaged or diverged in training";
    /// Experts are MXFP4, or quantising them was asked for.
    SourceExpertsBf16 = "SRC-BF16-EXPERTS", Source, "pass --quantize to turn BF16 experts into MXFP4";
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.id())
    }
}

impl serde::Serialize for Rule {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.id())
    }
}
