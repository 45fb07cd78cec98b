//! One SafeTensors file: its header, checked, and positioned reads of its bytes.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::config::excerpt;
use crate::rules::Rule;
use crate::violation::{Error, Result, Violation};

/// The longest JSON text that is read, the limit of the SafeTensors library itself.
pub(super) const MAX_JSON: u64 = 100_000_000;

/// A SafeTensors file whose header is sound.
#[derive(Debug)]
pub(super) struct Shard {
    /// Its name within the folder.
    pub(super) name: String,
    path: PathBuf,
    file: File,
}

/// A tensor as its header describes it.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    /// Its bytes, from the start of the file.
    pub(super) range: Range<u64>,
}

impl Shard {
    /// Opens a file and checks its header: every byte behind it belongs to exactly one tensor.
    ///
    /// # Errors
    /// [`Error::Invalid`] with `SRC-CONTAINER` and `SRC-DUPLICATE` violations, [`Error::Io`].
    pub(super) fn open(path: &Path, name: &str) -> Result<(Shard, Vec<(String, Stored)>)> {
        let refuse = |violations| Error::Invalid { path: path.into(), violations };
        let container = |field: &str, range, found: String, needed: &str| Violation {
            rule: Rule::SourceContainer,
            section: name.into(),
            field: field.into(),
            range,
            found,
            needed: needed.into(),
        };

        let file = File::open(path).map_err(Error::io(path))?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        let shard = Shard { name: name.into(), path: path.into(), file };
        if len < 8 {
            let found = format!("a file of {len} bytes");
            return Err(refuse(vec![container("header length", 0..len, found, "8 bytes and a JSON header")]));
        }
        let mut length = [0; 8];
        shard.read_at(&mut length, 0)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_JSON || length > len - 8 {
            let found = format!("{length} in a file of {len} bytes");
            let needed = "a header within the file and of at most 100000000 bytes";
            return Err(refuse(vec![container("header length", 0..8, found, needed)]));
        }
        let data = 8 + length;
        let mut json = vec![0; length as usize];
        shard.read_at(&mut json, 8)?;
        let mut entries = match serde_json::from_slice::<Entries<TensorInfo>>(&json) {
            Ok(Entries(entries)) => entries,
            Err(error) => {
                let needed = "a JSON object of dtype, shape and data_offsets by tensor name";
                return Err(refuse(vec![container("header", 8..data, error.to_string(), needed)]));
            }
        };
        drop(json);

        // By offset, as the specification of SafeTensors orders the checks; an empty tensor before the one it touches.
        entries.sort_by(|(a_name, a), (b_name, b)| (a.data_offsets, a_name).cmp(&(b.data_offsets, b_name)));
        let in_file = |offset: usize| data.saturating_add(offset as u64);
        let mut violations = Vec::new();
        let mut end = 0;
        for (tensor, info) in &entries {
            let (first, last) = info.data_offsets;
            let found = format!("data_offsets [{first}, {last}]");
            let range = in_file(first)..in_file(last);
            if last < first || in_file(last) > len {
                let needed = format!("offsets in order and within the {} bytes of data", len - data);
                violations.push(container(tensor, in_file(first).min(len)..len, found, &needed));
                continue;
            }
            if first != end {
                let what = if first < end { "an overlap" } else { "a gap" };
                let needed = format!("a start at {end}: {what} lies between this tensor and the one before");
                violations.push(container(tensor, range.clone(), found, &needed));
            }
            end = end.max(last);
            if byte_length(info) != Some(last - first) {
                let found = format!("{} bytes for {} {:?}", last - first, info.dtype, info.shape);
                violations.push(container(tensor, range, found, "as many bytes as dtype and shape imply"));
            }
        }
        if violations.is_empty() && in_file(end) != len {
            let found = format!("{} bytes behind the last tensor", len - in_file(end));
            violations.push(container(
                "data",
                in_file(end)..len,
                found,
                "a file that ends with its last tensor",
            ));
        }
        let names = entries.iter().map(|(name, _)| name.as_str()).collect();
        violations.extend(duplicates(names).into_iter().map(|tensor| Violation {
            rule: Rule::SourceDuplicate,
            section: name.into(),
            field: tensor.into(),
            range: 8..data,
            found: "the name twice in the header".into(),
            needed: "each name once".into(),
        }));
        if !violations.is_empty() {
            return Err(refuse(violations));
        }
        let tensors = entries.into_iter().map(|(name, info)| {
            let range = in_file(info.data_offsets.0)..in_file(info.data_offsets.1);
            let shape = info.shape.iter().map(|&size| size as u64).collect();
            (name, Stored { dtype: info.dtype, shape, range })
        });
        Ok((shard, tensors.collect()))
    }

    /// Fills `out` with the file's bytes from `offset` on.
    pub(super) fn read_at(&self, out: &mut [u8], offset: u64) -> Result<()> {
        read_exact_at(&self.file, out, offset).map_err(Error::io(&self.path))
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !out.is_empty() {
        match file.seek_read(out, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                out = &mut out[read..];
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn byte_length(info: &TensorInfo) -> Option<usize> {
    let elements = info.shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))?;
    let bits = elements.checked_mul(info.dtype.bitsize())?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// The names that occur more than once.
pub(super) fn duplicates(mut names: Vec<&str>) -> Vec<&str> {
    names.sort_unstable();
    let mut repeated: Vec<_> =
        names.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).collect();
    repeated.dedup();
    repeated
}

/// A JSON object's entries as they stand, repeated keys included, without `__metadata__`.
pub(super) struct Entries<V>(pub(super) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for Collect<V> {
            type Value = Entries<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<V>, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        map.next_value::<HashMap<String, String>>()?;
                        continue;
                    }
                    let value = map.next_value();
                    let named = |error| A::Error::custom(format_args!("{}: {error}", excerpt(&key)));
                    let value = value.map_err(named)?;
                    entries.push((key, value));
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(Collect(PhantomData))
    }
}
