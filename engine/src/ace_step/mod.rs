//! ACE-Step v1 (3.5B): music from a prompt and lyrics (`ace-step/ACE-Step`, arXiv:2506.00045).
//!
//! ```text
//! prompt ─ prompt::Tokenizer ─► umt5::Encoder ─► text   ┐
//! lyrics ─ lyrics::Tokenizer ─► ids                     ├─► transformer::Transformer::encode, prepare ─► contexts
//! speaker: zeros                                        ┘                                                  │
//! noise ──────────────────────────► sampling: decode, guide, step, again and again ◄───────────────────────┘
//!                                     │ latent [batch, 8, 16, frames]
//!                                     ▼
//!          decode: dcae::Decoder ─► log-mel [2, 128, 8 · frames] ─► vocoder::Vocoder ─► 44.1 kHz ─► 48 kHz ─► WAV
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`pipeline`] | from a folder and a request to a song, a stage after the other |
//! | [`sampling`] | the loop over the steps: text to music, audio to audio, retake, repaint, edit |
//! | [`transformer`] | velocity of a noisy latent |
//! | [`dcae`], [`vocoder`], [`decode`] | latents to sound, and back |
//! | [`umt5`], [`prompt`], [`lyrics`] | text |
//! | [`erg`] | what makes attention less sharp, to be steered away from |
//! | [`checkpoint`], [`preset`], [`plan`] | what a folder has, configurations, and what a song will take |
//! | [`verify`] | every part beside the original's results |
//!
//! Every model has one constructor, `new(config, weights)`, and computes in f32 but for the factors of products, which
//! [`Types`](crate::weights::Types) chooses.

pub mod checkpoint;
pub mod dcae;
pub mod decode;
pub mod erg;
pub mod lyrics;
pub mod pipeline;
pub mod plan;
pub mod preset;
pub mod prompt;
pub mod sampling;
pub mod transformer;
pub mod umt5;
pub mod verify;
pub mod vocoder;

/// Samples a second of the vocoder.
pub const SAMPLE_RATE: u32 = 44100;
/// Samples a second of a finished song.
pub const SONG_RATE: u32 = 48000;
/// Samples of a mel frame.
pub const HOP: usize = 512;
/// Mel frames of a frame of a latent.
pub const MEL_FRAMES: usize = 8;

/// Whole frames of a latent in a time: 10.766 a second.
pub fn frames_of_seconds(seconds: f64) -> usize {
    (seconds * f64::from(SAMPLE_RATE) / HOP as f64 / MEL_FRAMES as f64) as usize
}

/// Seconds of so many frames of a latent.
pub fn seconds_of_frames(frames: usize) -> f64 {
    (frames * MEL_FRAMES * HOP) as f64 / f64::from(SAMPLE_RATE)
}
