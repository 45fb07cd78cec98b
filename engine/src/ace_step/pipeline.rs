//! From a checkpoint and a request to a song, one stage after the other.
//!
//! ```text
//! Pipeline::open     headers, configurations and tokenizers; every name and shape is checked here
//! ├ prompt           loads UMT5, encodes, frees it
//! ├ transformer      loads the transformer; sampling::sample or sampling::edit runs it
//! ├ decoder          loads decoder and vocoder: latent → sound
//! └ encoder          loads the encoder: sound → latent, for what is made from a recording
//! ```
//!
//! Who makes one song lets each stage go before the next is loaded; who makes many keeps what memory allows.

use std::path::Path;

use burn::tensor::Tensor;
use formats::progress::Progress;

use super::checkpoint::{self, Checkpoint, Found};
use super::decode::{MusicDecoder, MusicEncoder};
use super::erg::Weaken;
use super::lyrics::{self, Lyrics, Note};
use super::preset::Configs;
use super::sampling::Song;
use super::transformer::{Prompt, Transformer};
use super::{prompt, umt5};
use crate::backend::Device;
use crate::error::{Error, Result};
use crate::nn::hooks::Hooks;
use crate::weights::Types;

/// A checkpoint of which everything is known but the weights.
pub struct Pipeline {
    checkpoint: Checkpoint,
    prompts: prompt::Tokenizer,
    lyrics: Option<lyrics::Tokenizer>,
    device: Device,
    types: Types,
}

/// Text as the transformer takes it.
pub struct EncodedSong {
    /// What is sampled.
    pub song: Song,
    /// What the user may want to write otherwise.
    pub notes: Vec<Note>,
}

impl Pipeline {
    /// Opens a checkpoint, and checks every name and shape of its tensors. `lyric_vocab` is needed for songs with words.
    ///
    /// # Errors
    /// [`Error::Component`] where a file is missing or is none, [`Error::Mismatches`] where tensors are not those of the
    /// model.
    pub fn open(path: &Path, lyric_vocab: Option<&Path>, device: &Device, types: Types) -> Result<Pipeline> {
        let checkpoint = Checkpoint::open(path)?;
        for component in checkpoint::shapes(path) {
            match component.found {
                Found::Unreadable { error } => {
                    return Err(Error::Component { path: path.join(component.name), reason: error });
                }
                Found::Tensors { mismatches, .. } if !mismatches.is_empty() => {
                    return Err(Error::Mismatches { path: path.join(component.name), mismatches });
                }
                Found::Tensors { .. } => {}
            }
        }
        Ok(Pipeline {
            prompts: prompt::Tokenizer::open(&checkpoint.umt5.path)?,
            lyrics: lyric_vocab.map(lyrics::Tokenizer::open).transpose()?,
            checkpoint,
            device: device.clone(),
            types,
        })
    }

    /// The configurations, for a [`Plan`](super::plan::Plan).
    pub fn configs(&self) -> Configs {
        let Checkpoint { transformer, dcae, vocoder, umt5, .. } = &self.checkpoint;
        Configs {
            transformer: transformer.config.clone(),
            dcae: dcae.config.clone(),
            vocoder: vocoder.config.clone(),
            umt5: umt5.config.clone(),
        }
    }

    /// How many tokens a description and lyrics have.
    ///
    /// # Errors
    /// Those of the tokenizers.
    pub fn count(&self, description: &str, lyrics: &Lyrics) -> Result<[usize; 2]> {
        let tokens = self.prompts.encode(&[description])?;
        Ok([tokens.ids[0].len(), self.lyrics(lyrics)?.ids.len()])
    }

    /// Encodes a description and lyrics. UMT5 is loaded for it and freed again.
    ///
    /// # Errors
    /// Those of the tokenizers and of loading.
    pub fn prompt(&self, description: &str, lyrics: &Lyrics, progress: &dyn Progress) -> Result<EncodedSong> {
        let tokens = self.prompts.encode(&[description])?;
        let lyrics = self.lyrics(lyrics)?;
        let component = &self.checkpoint.umt5;
        let encoder = component.load(&self.device, self.types, progress, |weights| {
            umt5::Encoder::new(&component.config, weights)
        })?;
        let text = encoder.forward(&tokens, None, &Hooks::none())?;
        let text_null = encoder.forward(&tokens, Some(&Weaken::TEXT), &Hooks::none())?;
        self.device.sync()?;
        let speaker = self.checkpoint.transformer.config.speaker_embedding_dim;
        let prompt = Prompt {
            text,
            text_mask: tokens.mask,
            speaker: Tensor::zeros([1, speaker], self.device.burn()),
            lyrics: vec![lyrics.ids],
            lyric_mask: vec![lyrics.mask],
        };
        Ok(EncodedSong { song: Song { prompt, text_null: Some(text_null) }, notes: lyrics.notes })
    }

    /// Loads the transformer.
    ///
    /// # Errors
    /// Those of loading.
    pub fn transformer(&self, progress: &dyn Progress) -> Result<Transformer> {
        let component = &self.checkpoint.transformer;
        component
            .load(&self.device, self.types, progress, |weights| Transformer::new(&component.config, weights))
    }

    /// Loads what makes sound of latents.
    ///
    /// # Errors
    /// Those of loading.
    pub fn decoder(&self, progress: &dyn Progress) -> Result<MusicDecoder> {
        MusicDecoder::load(
            &self.checkpoint.dcae,
            &self.checkpoint.vocoder,
            &self.device,
            self.types,
            progress,
        )
    }

    /// Loads what makes latents of sound.
    ///
    /// # Errors
    /// Those of loading.
    pub fn encoder(&self, progress: &dyn Progress) -> Result<MusicEncoder> {
        MusicEncoder::load(
            &self.checkpoint.dcae,
            &self.checkpoint.vocoder,
            &self.device,
            self.types,
            progress,
        )
    }

    fn lyrics(&self, lyrics: &Lyrics) -> Result<lyrics::Encoded> {
        match &self.lyrics {
            Some(tokenizer) => tokenizer.encode(lyrics),
            None if lyrics.lines.iter().all(|line| line.text.is_empty()) => {
                Ok(lyrics::Encoded { ids: vec![0], mask: vec![false], notes: Vec::new() })
            }
            None => Err(Error::Model {
                field: "--lyric-vocab",
                found: "nothing, and lyrics".into(),
                needed: "vocab.json of acestep/models/lyrics_utils in the original repository".into(),
            }),
        }
    }
}
