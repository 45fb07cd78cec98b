//! Tables of which a few rows are needed at a time.

use formats::checkpoint::TensorFile;
use safetensors::Dtype;

use super::{random, values, wrong};
use crate::error::{Error, Result};

/// A `[rows, width]` matrix that stays in its file: a row is read when it is asked for.
///
/// The token embedding of UMT5 takes 787 MB, of which a prompt of 256 tokens needs 768 KiB.
#[derive(Debug)]
pub struct Table {
    source: Source,
    shape: [usize; 2],
}

#[derive(Debug)]
enum Source {
    /// Where only names are wanted.
    Nothing,
    Random {
        seed: u64,
        name: String,
    },
    /// The file is open, so that the rows are those of the file that was checked.
    File {
        file: TensorFile,
        name: String,
        dtype: Dtype,
    },
}

impl Table {
    pub(super) fn empty(shape: [usize; 2]) -> Table {
        Table { source: Source::Nothing, shape }
    }

    pub(super) fn random(seed: u64, name: String, shape: [usize; 2]) -> Table {
        Table { source: Source::Random { seed, name }, shape }
    }

    pub(super) fn of_file(file: &TensorFile, name: &str, shape: [usize; 2]) -> Result<Table> {
        // A file of its own: the table outlives the one that it was found in.
        let file = TensorFile::open(file.path())?;
        let (name, info) = values::find(&file, name, &shape)?;
        let (name, dtype) = (name.to_owned(), info.dtype);
        if !matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64) {
            return Err(wrong(&file, &name, format!("{dtype:?}"), "BF16, F16, F32 or F64".into()));
        }
        Ok(Table { source: Source::File { file, name, dtype }, shape })
    }

    /// `[rows, width]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The rows of some tokens one after the other, f32.
    ///
    /// # Errors
    /// [`Error::Token`] for an id beyond the last row, [`Error::Weights`] for a row that holds what is no number, and
    /// [`Error::Format`] where the file cannot be read any more.
    pub fn rows(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let [rows, width] = self.shape;
        let mut values = Vec::with_capacity(tokens.len() * width);
        for (position, &token) in tokens.iter().enumerate() {
            if token as usize >= rows {
                return Err(Error::Token { token, position, vocabulary: rows });
            }
            match &self.source {
                Source::Nothing => values.resize(values.len() + width, 0.0),
                // Each row follows from its own name, so that none of the others has to be made.
                Source::Random { seed, name } => {
                    values.extend(random::values(*seed, &format!("{name}[{token}]"), &[1, width]));
                }
                Source::File { file, name, dtype } => {
                    let mut bytes = vec![0; width * dtype.bitsize() / 8];
                    file.read_part(name, u64::from(token) * bytes.len() as u64, &mut bytes)?;
                    values.extend(values::decode(file, name, *dtype, &bytes)?);
                }
            }
        }
        Ok(values)
    }
}
