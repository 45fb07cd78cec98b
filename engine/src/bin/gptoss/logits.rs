//! `logits`: what a model says of every position, in a file; and the same as a reference for comparisons.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueHint;
use engine::gpt_oss::Model;
use formats::command::{Console, Outcome};
use formats::model_bin::model::Bytes;
use formats::output::Output;
use formats::progress::Progress;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};

use crate::options::{DeviceOptions, StoredFlags, read_tokens};

/// The tensor's name.
const LOGITS: &str = "logits";
/// Where the file says which tokens they belong to: a JSON list under this key of the metadata.
const TOKENS: &str = "tokens";

#[derive(clap::Args)]
pub struct Arguments {
    /// A model.bin, a SafeTensors folder or a GGUF file.
    #[arg(value_hint = ValueHint::AnyPath)]
    checkpoint: PathBuf,
    /// Token ids as JSON: a list of numbers.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    tokens: PathBuf,
    /// The SafeTensors file to write: a tensor `logits`, f32 [positions, vocabulary]. It appears when it is complete.
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    out: PathBuf,
    #[command(flatten)]
    stored: StoredFlags,
    #[command(flatten)]
    device: DeviceOptions,
}

/// `gptoss logits`.
pub fn logits(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    let tokens = read_tokens(&arguments.tokens)?;
    // An output that cannot be shall not cost a computation.
    let output = Output::create(&arguments.out)?;
    let stored = arguments.stored.open(&arguments.checkpoint, console)?;
    let model = arguments.device.load(&stored, console)?;
    write(&model, &tokens, output, console)?;
    let vocabulary = model.config().vocabulary;
    let (positions, seconds) = (tokens.len(), console.seconds());
    if console.json {
        let document = serde_json::json!({
            "checkpoint": arguments.checkpoint,
            "target": arguments.out,
            "positions": positions,
            "vocabulary": vocabulary,
            "device": model.device().name(),
            "backend": model.device().backend(),
            "seconds": seconds,
        });
        console.document(&mut std::io::stdout(), &document)?;
    } else {
        let target = arguments.out.display();
        writeln!(std::io::stdout(), "{target}: logits f32 [{positions}, {vocabulary}], {seconds:.1} s")?;
    }
    Ok(Outcome::Fine)
}

/// Computes the logits after each token and writes them, a chunk at a time.
pub fn write(model: &Model, tokens: &[u32], output: Output, console: &Console) -> Result<()> {
    ensure!(!tokens.is_empty(), "found no tokens, needed one at least");
    let vocabulary = model.config().vocabulary;
    let bytes = tokens.len() * vocabulary * 4;
    let info =
        TensorInfo { dtype: Dtype::F32, shape: vec![tokens.len(), vocabulary], data_offsets: (0, bytes) };
    let about = [
        (TOKENS.to_string(), serde_json::to_string(tokens)?),
        ("device".into(), format!("{} ({})", model.device().name(), model.device().backend())),
    ];
    let metadata = Metadata::new(Some(about.into()), vec![(LOGITS.to_string(), info)])?;
    let mut header = serde_json::to_vec(&metadata)?;
    // The data starts on a multiple of 8, as the safetensors crate writes it.
    header.resize(header.len().next_multiple_of(8), b' ');
    let target = output.target().display().to_string();
    let mut out = BufWriter::with_capacity(1 << 20, output.file());
    out.write_all(&(header.len() as u64).to_le_bytes()).with_context(|| target.clone())?;
    out.write_all(&header).with_context(|| target.clone())?;
    console.begin("computing logits", bytes as u64);
    model.logits(tokens, |_, rows| -> Result<()> {
        for value in &rows {
            out.write_all(&value.to_le_bytes()).with_context(|| target.clone())?;
        }
        console.advance(rows.len() as u64 * 4);
        Ok(())
    })?;
    out.flush().with_context(|| target.clone())?;
    drop(out);
    output.finish()?;
    console.done();
    Ok(())
}

/// Logits in a file, and the tokens if it says which.
pub struct Reference {
    bytes: Bytes,
    /// Where the tensor's data begins.
    start: usize,
    /// Rows of the tensor.
    pub positions: usize,
    /// Columns of the tensor.
    pub vocabulary: usize,
    /// What the logits follow, one token for each row.
    pub tokens: Option<Vec<u32>>,
}

impl Reference {
    /// Opens a file that `logits` wrote, or a trace: a tensor `logits`, f32 `[positions, vocabulary]`, and tokens in the
    /// metadata or as an integer tensor `tokens`.
    pub fn open(path: &Path) -> Result<Reference> {
        Reference::read(Bytes::map(path)?).with_context(|| path.display().to_string())
    }

    fn read(bytes: Bytes) -> Result<Reference> {
        let (header_len, metadata) = SafeTensors::read_metadata(&bytes)?;
        let file = SafeTensors::deserialize(&bytes)?;
        let tensor = file.tensor(LOGITS)?;
        ensure!(tensor.dtype() == Dtype::F32, "the tensor logits is {:?}, needed F32", tensor.dtype());
        let &[positions, vocabulary] = tensor.shape() else {
            bail!("the tensor logits has the shape {:?}, needed [positions, vocabulary]", tensor.shape());
        };
        let listed = metadata.metadata().as_ref().and_then(|about| about.get(TOKENS));
        let tokens: Option<Vec<u32>> = match (listed, file.tensor(TOKENS)) {
            (Some(list), _) => Some(serde_json::from_str(list).context("its tokens")?),
            (None, Ok(tensor)) => Some(integers(tensor.dtype(), tensor.data())?),
            (None, Err(_)) => None,
        };
        if let Some(tokens) = &tokens {
            ensure!(
                tokens.len() == positions,
                "found logits of {positions} positions and {} tokens, needed as many",
                tokens.len()
            );
        }
        let info = metadata.info(LOGITS).context("the tensor logits")?;
        let start = 8 + header_len + info.data_offsets.0;
        Ok(Reference { start, positions, vocabulary, tokens, bytes })
    }

    /// Logits after a token: f32 `[vocabulary]`; empty where there are none.
    pub fn row(&self, position: usize) -> Vec<f32> {
        let size = self.vocabulary * 4;
        let start = self.start + position * size;
        let bytes =
            self.bytes.get(start..start + size).filter(|_| position < self.positions).unwrap_or_default();
        bytes.as_chunks::<4>().0.iter().map(|&value| f32::from_le_bytes(value)).collect()
    }
}

fn integers(dtype: Dtype, bytes: &[u8]) -> Result<Vec<u32>> {
    let values: Vec<i64> = match dtype {
        Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|&value| i64::from_le_bytes(value)).collect(),
        Dtype::I32 => {
            bytes.as_chunks::<4>().0.iter().map(|&value| i32::from_le_bytes(value).into()).collect()
        }
        Dtype::U32 => {
            bytes.as_chunks::<4>().0.iter().map(|&value| u32::from_le_bytes(value).into()).collect()
        }
        other => bail!("the tensor tokens is {other:?}, needed I32, I64 or U32"),
    };
    values.into_iter().map(|id| id.try_into().with_context(|| format!("{id} is no token id"))).collect()
}
