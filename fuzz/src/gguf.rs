//! Target `gguf`.

use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use binrw::{BinRead, BinWrite};
use formats::Error;
use formats::canonical::Source;
use formats::gguf::container::{Array, Container, Description, Entry, Flag, GgmlType, Text, Value};
use formats::gguf::{self as codec, Model};

use crate::tiny::Tiny;
use crate::trickle::Trickle;
use crate::{accepted, bounded, scratch};

#[derive(Arbitrary, Debug)]
struct Input {
    blocks: bool,
    edits: Vec<Edit>,
    cut: Cut,
    patches: Vec<(u32, Vec<u8>)>,
}

/// Where the file ends early.
#[derive(Arbitrary, Debug)]
enum Cut {
    None,
    At(u32),
    Last(u8),
}

#[derive(Arbitrary, Debug)]
enum Edit {
    RemoveEntry(u8),
    RepeatEntry(u8),
    Value(u8, Replacement),
    Entry(String, Replacement),
    Alignment(u32),
    /// One element of an array.
    Element(u8, u16, Replacement),
    RemoveTensor(u8),
    RepeatTensor(u8),
    Name(u8, String),
    Type(u8, u8),
    Axis(u8, u8, u64),
    Axes(u8, Vec<u64>),
    Offset(u8, u64),
}

#[derive(Arbitrary, Debug)]
enum Replacement {
    U32(u32),
    F32(f32),
    I64(i64),
    Bool(bool),
    Text(String),
    Bytes(Vec<u8>),
    Words(Vec<i32>),
    Texts(Vec<String>),
    Nested(u8, Vec<u8>),
}

struct Base {
    description: Description,
    /// What follows the description, from its first aligned byte on.
    data: Vec<u8>,
}

/// What `write` makes of [`Tiny`].
static BASES: LazyLock<[Base; 2]> = LazyLock::new(|| {
    [0, 1].map(|blocks| {
        let folder = scratch::folder();
        let path = folder.path().join("model.gguf");
        codec::write(&Tiny::new(blocks), &path, None, &()).expect("a model that can be written");
        let bytes = fs::read(path).expect("the file");
        let mut reader = Cursor::new(&bytes);
        let description = Description::read(&mut reader).expect("a description that was written");
        let start = (reader.position() as usize).next_multiple_of(32);
        Base { description, data: bytes[start..].to_vec() }
    })
});

/// The container is read within bounded memory, alike however its bytes arrive, and a description is written again as
/// it stood. A model that is accepted can be read whole and exported, and the export is valid.
pub fn gguf(data: &[u8]) {
    check(data);
    if let Some(input) = crate::instructions::<Input>(data).filter(|_| !data.starts_with(b"GGUF")) {
        check(&input.apply());
    }
}

fn check(bytes: &[u8]) {
    let len = bytes.len() as u64;
    let container = bounded(bytes.len(), || Container::read(Cursor::new(bytes), len));
    // A NaN is not equal to itself, so the texts are compared.
    let trickled = Container::read(Trickle::new(bytes, 5), len);
    assert_eq!(trickled.is_ok(), container.is_ok());
    if let (Err(one), Err(other)) = (&trickled, &container) {
        assert_eq!(one, other);
    }
    let mut reader = Cursor::new(bytes);
    if let Ok(description) = Description::read(&mut reader) {
        let mut written = Cursor::new(Vec::new());
        description.write(&mut written).expect("a description that was read");
        assert!(
            written.into_inner() == bytes[..reader.position() as usize],
            "the description is written otherwise"
        );
    }
    if let Ok(container) = &container {
        for (name, tensor) in container.tensors() {
            assert!(
                tensor.range.start <= tensor.range.end && tensor.range.end <= len,
                "{name}: {:?}",
                tensor.range
            );
        }
    }
    match bounded(bytes.len(), || Model::from_bytes(Path::new("fuzzed.gguf"), bytes.to_vec())) {
        Ok(model) => {
            for (id, reason) in model.changed() {
                assert!(model.dims().tensors().any(|other| other == id) && !reason.is_empty());
            }
            accepted::check(&model);
        }
        Err(Error::Invalid { violations, .. }) => assert!(!violations.is_empty()),
        Err(other) => panic!("{other}"),
    }
}

impl Input {
    fn apply(&self) -> Vec<u8> {
        let base = &BASES[usize::from(self.blocks)];
        let mut description = base.description.clone();
        for edit in &self.edits {
            edit.apply(&mut description);
        }
        let mut bytes = Cursor::new(Vec::new());
        description.write(&mut bytes).expect("a description in memory");
        let mut bytes = bytes.into_inner();
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&base.data);
        for (at, patch) in &self.patches {
            let at = *at as usize % bytes.len();
            bytes[at..].iter_mut().zip(patch).for_each(|(byte, patch)| *byte = *patch);
        }
        match self.cut {
            Cut::None => {}
            Cut::At(at) => bytes.truncate(at as usize % bytes.len()),
            Cut::Last(count) => bytes.truncate(bytes.len() - usize::from(count)),
        }
        bytes
    }
}

impl Edit {
    fn apply(&self, description: &mut Description) {
        let Description { metadata, tensors } = description;
        let (entries, infos) = (metadata.len().max(1), tensors.len().max(1));
        let entry = |index: &u8| usize::from(*index) % entries;
        let info = |index: &u8| usize::from(*index) % infos;
        match self {
            Edit::RemoveEntry(index) if entry(index) < metadata.len() => {
                metadata.remove(entry(index));
            }
            Edit::RepeatEntry(index) => metadata.extend(metadata.get(entry(index)).cloned()),
            Edit::Value(index, value) => {
                if let Some(entry) = metadata.get_mut(entry(index)) {
                    entry.value = value.value();
                }
            }
            Edit::Entry(key, value) => metadata.push(Entry { key: Text(key.clone()), value: value.value() }),
            Edit::Alignment(alignment) => {
                metadata.push(Entry { key: "general.alignment".into(), value: Value::U32(*alignment) });
            }
            Edit::Element(index, element, value) => {
                let element = usize::from(*element);
                match (metadata.get_mut(entry(index)).map(|entry| &mut entry.value), value) {
                    (Some(Value::Array(Array::String(texts))), Replacement::Text(text)) => {
                        let count = texts.len().max(1);
                        texts.get_mut(element % count).into_iter().for_each(|old| *old = Text(text.clone()));
                    }
                    (Some(Value::Array(Array::I32(words))), Replacement::U32(word)) => {
                        let count = words.len().max(1);
                        words.get_mut(element % count).into_iter().for_each(|old| *old = *word as i32);
                    }
                    (Some(Value::Array(Array::U8(bytes))), Replacement::U32(word)) => {
                        let count = bytes.len().max(1);
                        let old = bytes.get_mut(element % count..).into_iter().flatten();
                        old.zip(word.to_le_bytes()).for_each(|(old, new)| *old = new);
                    }
                    _ => {}
                }
            }
            Edit::RemoveTensor(index) if info(index) < tensors.len() => {
                tensors.remove(info(index));
            }
            Edit::RepeatTensor(index) => tensors.extend(tensors.get(info(index)).cloned()),
            Edit::Name(index, name) => {
                if let Some(tensor) = tensors.get_mut(info(index)) {
                    tensor.name = Text(name.clone());
                }
            }
            Edit::Type(index, ty) => {
                if let Some(tensor) = tensors.get_mut(info(index)) {
                    tensor.ty = GgmlType::ALL.get(usize::from(*ty)).map_or((*ty).into(), |ty| ty.id);
                }
            }
            Edit::Axis(index, axis, size) => {
                let axes = tensors.get_mut(info(index)).map(|tensor| &mut tensor.axes);
                if let Some(old) = axes.and_then(|axes| axes.get_mut(usize::from(axis % 4))) {
                    *old = *size;
                }
            }
            Edit::Axes(index, sizes) => {
                if let Some(tensor) = tensors.get_mut(info(index)) {
                    tensor.axes.clone_from(sizes);
                }
            }
            Edit::Offset(index, offset) => {
                if let Some(tensor) = tensors.get_mut(info(index)) {
                    tensor.offset = *offset;
                }
            }
            _ => {}
        }
    }
}

impl Replacement {
    fn value(&self) -> Value {
        match self {
            Replacement::U32(value) => Value::U32(*value),
            Replacement::F32(value) => Value::F32(*value),
            Replacement::I64(value) => Value::I64(*value),
            Replacement::Bool(value) => Value::Bool(Flag(*value)),
            Replacement::Text(text) => Value::String(Text(text.clone())),
            Replacement::Bytes(bytes) => Value::Array(Array::U8(bytes.clone())),
            Replacement::Words(words) => Value::Array(Array::I32(words.clone())),
            Replacement::Texts(texts) => {
                Value::Array(Array::String(texts.iter().cloned().map(Text).collect()))
            }
            Replacement::Nested(depth, bytes) => {
                let innermost = Array::U8(bytes.clone());
                Value::Array((0..depth % 8).fold(innermost, |array, _| Array::Array(vec![array])))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without edits there is nothing to refuse; otherwise the target would look at refusals only.
    #[test]
    fn an_unedited_file_is_accepted() {
        for blocks in [false, true] {
            let input = Input { blocks, edits: Vec::new(), cut: Cut::None, patches: Vec::new() };
            let model = Model::from_bytes(Path::new("tiny.gguf"), input.apply()).expect("a sound file");
            let exported = crate::tiny::model_bin(&model).expect("an export");
            assert!(exported == crate::tiny::model_bin(&Tiny::new(blocks.into())).expect("an export"));
        }
    }
}
