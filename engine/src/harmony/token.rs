//! The special tokens of Harmony, ids of o200k_harmony. Source: "Special Tokens" of OpenAI's format guide.

/// `<|return|>`: the turn is complete. Stop sampling.
pub const RETURN: u32 = 200_002;
/// `<|constrain|>`: the type of the content follows.
pub const CONSTRAIN: u32 = 200_003;
/// `<|channel|>`: the channel follows.
pub const CHANNEL: u32 = 200_005;
/// `<|start|>`: a message begins with its header, and that with its role.
pub const START: u32 = 200_006;
/// `<|end|>`: the message is complete.
pub const END: u32 = 200_007;
/// `<|message|>`: the header is complete, the content follows.
pub const MESSAGE: u32 = 200_008;
/// `<|call|>`: the message is complete and is a tool call. Stop sampling.
pub const CALL: u32 = 200_012;

/// The tokens that end sampling.
pub const STOP: [u32; 2] = [RETURN, CALL];

/// Every token above with its name.
pub(super) const NAMES: [(u32, &str); 7] = [
    (RETURN, "<|return|>"),
    (CONSTRAIN, "<|constrain|>"),
    (CHANNEL, "<|channel|>"),
    (START, "<|start|>"),
    (END, "<|end|>"),
    (MESSAGE, "<|message|>"),
    (CALL, "<|call|>"),
];
