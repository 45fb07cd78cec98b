//! The GGUF container, version 3, little-endian: metadata and tensor descriptions, then tensor data.
//!
//! [`Description`] is everything before the data, for reading and writing alike. Source: ggml's `docs/gguf.md` and
//! `gguf.cpp`. The input is untrusted: nothing is reserved from a declared count, so memory is bounded by the bytes
//! that are really there, and those by [`MAX_DESCRIPTION`].

use std::collections::{HashMap, hash_map};
use std::fmt;
use std::io::{Read, Seek, Write};
use std::ops::Range;

use binrw::{BinRead, BinResult, BinWrite, Endian, binrw};

use crate::{Rule, Violation};

/// The version that is read and written.
pub const VERSION: u32 = 3;
/// Boundary of tensor data where `general.alignment` does not say otherwise.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// Largest `general.alignment` that is accepted.
pub const MAX_ALIGNMENT: u64 = 1 << 16;
/// How deeply arrays may be nested; an array of numbers has depth 1.
pub const MAX_ARRAY_DEPTH: u32 = 4;
/// Axes that a tensor may have.
pub const MAX_AXES: u32 = 4;
/// Bytes that may stand before the tensor data. Real files have some 12 MB: tokens and merges.
pub const MAX_DESCRIPTION: u64 = 256 << 20;

/// Everything before the tensor data.
#[binrw]
#[brw(little, magic = b"GGUF")]
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    #[br(temp, parse_with = read_version)]
    #[bw(calc = VERSION)]
    version: u32,
    #[br(temp)]
    #[bw(calc = tensors.len() as u64)]
    tensor_count: u64,
    #[br(temp)]
    #[bw(calc = metadata.len() as u64)]
    metadata_count: u64,
    /// Keys and values.
    #[br(parse_with = items, args("GGUF metadata", metadata_count))]
    pub metadata: Vec<Entry>,
    /// Tensors in the order of their descriptions.
    #[br(parse_with = items, args("GGUF tensor descriptions", tensor_count))]
    pub tensors: Vec<TensorInfo>,
}

/// One key with its value.
#[binrw]
#[brw(little)]
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Dotted name.
    pub key: Text,
    /// Its value.
    pub value: Value,
}

/// Where a tensor is and how it is stored.
#[binrw]
#[brw(little)]
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Unique name.
    pub name: Text,
    #[br(temp)]
    #[bw(calc = axes.len() as u32)]
    num_axes: u32,
    /// Elements along each axis, fastest axis first (ggml's `ne`).
    #[br(parse_with = read_axes, args(num_axes))]
    pub axes: Vec<u64>,
    /// Element type, an id of [`GgmlType`].
    pub ty: u32,
    /// Start of its data, from the start of all tensor data.
    pub offset: u64,
}

/// A string: u64 length and UTF-8 bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Text(pub String);

/// A boolean, stored as a byte 0 or 1.
#[binrw]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flag(
    #[br(try_map = |byte: u8| match byte { 0 => Ok(false), 1 => Ok(true), _ => Err(NotBoolean) })]
    #[bw(map = |&flag| u8::from(flag))]
    pub bool,
);

#[derive(Debug, thiserror::Error)]
#[error("neither 0 nor 1")]
struct NotBoolean;

const ARRAY_ID: u32 = 9;

macro_rules! values {
    ($( $(#[doc = $doc:literal])+ $variant:ident($ty:ty) = $id:literal; )+) => {
        /// A metadata value.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Value {
            $( $(#[doc = $doc])+ $variant($ty), )+
            /// A sequence of values of one type.
            Array(Array),
        }

        /// A sequence of metadata values of one type.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Array {
            $( $(#[doc = $doc])+ $variant(Vec<$ty>), )+
            /// A sequence of sequences.
            Array(Vec<Array>),
        }

        impl BinRead for Value {
            type Args<'a> = ();

            fn read_options<R: Read + Seek>(reader: &mut R, endian: Endian, (): ()) -> BinResult<Self> {
                let start = reader.stream_position()?;
                match u32::read_options(reader, endian, ())? {
                    $( $id => BinRead::read_options(reader, endian, ()).map(Value::$variant), )+
                    ARRAY_ID => Array::read_nested(reader, endian, 1).map(Value::Array),
                    id => Err(unknown_type(start, id)),
                }
            }
        }

        impl BinWrite for Value {
            type Args<'a> = ();

            fn write_options<W: Write + Seek>(&self, writer: &mut W, endian: Endian, (): ()) -> BinResult<()> {
                match self {
                    $( Value::$variant(value) => {
                        let id: u32 = $id;
                        id.write_options(writer, endian, ())?;
                        value.write_options(writer, endian, ())
                    } )+
                    Value::Array(array) => {
                        ARRAY_ID.write_options(writer, endian, ())?;
                        array.write_options(writer, endian, ())
                    }
                }
            }
        }

        impl Array {
            fn read_nested<R: Read + Seek>(reader: &mut R, endian: Endian, depth: u32) -> BinResult<Self> {
                let start = reader.stream_position()?;
                let id = u32::read_options(reader, endian, ())?;
                let count = u64::read_options(reader, endian, ())?;
                match id {
                    $( $id => repeat(count, |_| BinRead::read_options(reader, endian, ())).map(Array::$variant), )+
                    ARRAY_ID if depth < MAX_ARRAY_DEPTH => {
                        repeat(count, |_| Array::read_nested(reader, endian, depth + 1)).map(Array::Array)
                    }
                    ARRAY_ID => Err(custom(
                        "GGUF metadata",
                        "array",
                        start..start + 4,
                        format!("arrays nested more than {MAX_ARRAY_DEPTH} deep"),
                        format!("a depth of at most {MAX_ARRAY_DEPTH}"),
                    )),
                    id => Err(unknown_type(start, id)),
                }
            }
        }

        impl BinWrite for Array {
            type Args<'a> = ();

            fn write_options<W: Write + Seek>(&self, writer: &mut W, endian: Endian, (): ()) -> BinResult<()> {
                let (id, count): (u32, usize) = match self {
                    $( Array::$variant(values) => ($id, values.len()), )+
                    Array::Array(values) => (ARRAY_ID, values.len()),
                };
                id.write_options(writer, endian, ())?;
                (count as u64).write_options(writer, endian, ())?;
                match self {
                    $( Array::$variant(values) => values.write_options(writer, endian, ()), )+
                    Array::Array(values) => values.write_options(writer, endian, ()),
                }
            }
        }
    };
}

values! {
    /// Unsigned, 1 byte.
    U8(u8) = 0;
    /// Signed, 1 byte.
    I8(i8) = 1;
    /// Unsigned, 2 bytes.
    U16(u16) = 2;
    /// Signed, 2 bytes.
    I16(i16) = 3;
    /// Unsigned, 4 bytes.
    U32(u32) = 4;
    /// Signed, 4 bytes.
    I32(i32) = 5;
    /// IEEE 754 binary32.
    F32(f32) = 6;
    /// Boolean.
    Bool(Flag) = 7;
    /// String.
    String(Text) = 8;
    /// Unsigned, 8 bytes.
    U64(u64) = 10;
    /// Signed, 8 bytes.
    I64(i64) = 11;
    /// IEEE 754 binary64.
    F64(f64) = 12;
}

/// How a ggml type stores elements: blocks of `elements` in `bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgmlType {
    /// Its number in the file.
    pub id: u32,
    /// ggml's name.
    pub name: &'static str,
    /// Elements of a block.
    pub elements: u64,
    /// Bytes of a block.
    pub bytes: u64,
}

impl GgmlType {
    /// IEEE 754 binary32.
    pub const F32: GgmlType = GgmlType::new(0, "F32", 1, 4);
    /// IEEE 754 binary16.
    pub const F16: GgmlType = GgmlType::new(1, "F16", 1, 2);
    /// bfloat16.
    pub const BF16: GgmlType = GgmlType::new(30, "BF16", 1, 2);
    /// OCP microscaling FP4: a scale byte and 32 codes.
    pub const MXFP4: GgmlType = GgmlType::new(39, "MXFP4", 32, 17);

    /// Every type of ggml 0.25 that a file can hold.
    pub const ALL: &'static [GgmlType] = &[
        GgmlType::F32,
        GgmlType::F16,
        GgmlType::new(2, "Q4_0", 32, 18),
        GgmlType::new(3, "Q4_1", 32, 20),
        GgmlType::new(6, "Q5_0", 32, 22),
        GgmlType::new(7, "Q5_1", 32, 24),
        GgmlType::new(8, "Q8_0", 32, 34),
        GgmlType::new(9, "Q8_1", 32, 36),
        GgmlType::new(10, "Q2_K", 256, 84),
        GgmlType::new(11, "Q3_K", 256, 110),
        GgmlType::new(12, "Q4_K", 256, 144),
        GgmlType::new(13, "Q5_K", 256, 176),
        GgmlType::new(14, "Q6_K", 256, 210),
        GgmlType::new(15, "Q8_K", 256, 292),
        GgmlType::new(16, "IQ2_XXS", 256, 66),
        GgmlType::new(17, "IQ2_XS", 256, 74),
        GgmlType::new(18, "IQ3_XXS", 256, 98),
        GgmlType::new(19, "IQ1_S", 256, 50),
        GgmlType::new(20, "IQ4_NL", 32, 18),
        GgmlType::new(21, "IQ3_S", 256, 110),
        GgmlType::new(22, "IQ2_S", 256, 82),
        GgmlType::new(23, "IQ4_XS", 256, 136),
        GgmlType::new(24, "I8", 1, 1),
        GgmlType::new(25, "I16", 1, 2),
        GgmlType::new(26, "I32", 1, 4),
        GgmlType::new(27, "I64", 1, 8),
        GgmlType::new(28, "F64", 1, 8),
        GgmlType::new(29, "IQ1_M", 256, 56),
        GgmlType::BF16,
        GgmlType::new(34, "TQ1_0", 256, 54),
        GgmlType::new(35, "TQ2_0", 256, 66),
        GgmlType::MXFP4,
        GgmlType::new(40, "NVFP4", 64, 36),
        GgmlType::new(41, "Q1_0", 128, 18),
        GgmlType::new(42, "Q2_0", 64, 18),
    ];

    const fn new(id: u32, name: &'static str, elements: u64, bytes: u64) -> GgmlType {
        GgmlType { id, name, elements, bytes }
    }

    /// The type with this number.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        GgmlType::ALL.iter().copied().find(|ty| ty.id == id)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}

/// A tensor whose data lies in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Elements along each axis, fastest axis first (ggml's `ne`).
    pub axes: Vec<u64>,
    /// Element type.
    pub ty: GgmlType,
    /// Its bytes, from the start of the file.
    pub range: Range<u64>,
}

/// A checked container: keys and names are unique, each tensor's data is aligned, inside the file and nobody else's.
#[derive(Clone, Debug, PartialEq)]
pub struct Container {
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, Tensor>,
}

impl Container {
    /// Reads the description of a file of `len` bytes from its start; tensor data is not read.
    ///
    /// # Errors
    /// `SRC-CONTAINER` and `SRC-DUPLICATE`, with the entry or tensor and the bytes concerned.
    pub fn read(reader: impl Read + Seek, len: u64) -> Result<Container, Vec<Violation>> {
        let mut reader = reader.take(len.min(MAX_DESCRIPTION));
        let description = Description::read(&mut reader).map_err(|error| vec![violation_in(&error, len)])?;
        let end = len.min(MAX_DESCRIPTION) - reader.limit();
        let mut violations = Vec::new();
        let metadata = unique(
            description.metadata.into_iter().map(|entry| (entry.key.0, entry.value)),
            "GGUF metadata",
            &mut violations,
        );
        let alignment = match alignment(metadata.get("general.alignment")) {
            Ok(alignment) => alignment,
            Err(violation) => {
                violations.push(violation);
                return Err(violations);
            }
        };
        let data = end.next_multiple_of(alignment);
        let tensors = description.tensors.into_iter().filter_map(|info| {
            let located = locate(&info, data, alignment, len);
            located.map(|tensor| (info.name.0, tensor)).map_err(|violation| violations.push(violation)).ok()
        });
        let tensors: Vec<_> = tensors.collect();
        check_overlaps(&tensors, &mut violations);
        let tensors = unique(tensors.into_iter(), "GGUF tensor descriptions", &mut violations);
        if violations.is_empty() { Ok(Container { metadata, tensors }) } else { Err(violations) }
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Every tensor, in no particular order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }
}

fn alignment(value: Option<&Value>) -> Result<u64, Violation> {
    let alignment = match value {
        None => return Ok(DEFAULT_ALIGNMENT),
        Some(Value::U32(alignment)) => u64::from(*alignment),
        Some(_) => 0,
    };
    if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT {
        return Ok(alignment);
    }
    let needed = format!("a u32 that is a power of two up to {MAX_ALIGNMENT}");
    Err(violation("GGUF metadata", "general.alignment", 0..0, format!("{value:?}"), needed))
}

/// The bytes of a tensor, checked against everything but the other tensors.
fn locate(info: &TensorInfo, data: u64, alignment: u64, len: u64) -> Result<Tensor, Violation> {
    let refuse = |range, found: String, needed: String| {
        Err(violation("GGUF tensor descriptions", &info.name.0, range, found, needed))
    };
    let Some(ty) = GgmlType::from_id(info.ty) else {
        return refuse(0..0, format!("type {}", info.ty), "a type that ggml has".into());
    };
    let first_axis = info.axes.first().copied().unwrap_or(1);
    if !first_axis.is_multiple_of(ty.elements) {
        let needed = format!("a multiple of {}, the block of {ty}", ty.elements);
        return refuse(0..0, format!("a first axis of {first_axis}"), needed);
    }
    // At most four axes, so u128 could overflow only beyond 2^128: `checked_mul` all the same.
    let elements = info.axes.iter().try_fold(1u128, |product, &axis| product.checked_mul(axis.into()));
    let size = elements
        .and_then(|elements| (elements / u128::from(ty.elements)).checked_mul(ty.bytes.into()))
        .and_then(|size| u64::try_from(size).ok());
    let range = size.and_then(|size| {
        let start = data.checked_add(info.offset)?;
        Some(start..start.checked_add(size)?)
    });
    let Some(range) = range else {
        let found = format!("axes {:?} of {ty} at offset {}", info.axes, info.offset);
        return refuse(0..0, found, "less than 2^64 bytes".into());
    };
    if !info.offset.is_multiple_of(alignment) {
        return refuse(
            range,
            format!("offset {}", info.offset),
            format!("a multiple of the alignment {alignment}"),
        );
    }
    if range.end > len {
        return refuse(range, format!("a file of {len} bytes"), "its data inside the file".into());
    }
    Ok(Tensor { axes: info.axes.clone(), ty, range })
}

fn check_overlaps(tensors: &[(String, Tensor)], violations: &mut Vec<Violation>) {
    let mut order: Vec<_> = tensors.iter().filter(|(_, tensor)| !tensor.range.is_empty()).collect();
    order.sort_by_key(|(_, tensor)| tensor.range.start);
    for pair in order.windows(2) {
        if let [(first, one), (second, other)] = pair
            && other.range.start < one.range.end
        {
            let found = format!("data shared with {first}");
            let shared = other.range.start..other.range.end.min(one.range.end);
            let section = "GGUF tensor descriptions";
            violations.push(violation(section, second, shared, found, "data of its own".into()));
        }
    }
}

fn unique<T>(
    items: impl Iterator<Item = (String, T)>,
    section: &str,
    violations: &mut Vec<Violation>,
) -> HashMap<String, T> {
    let mut map = HashMap::new();
    for (name, item) in items {
        match map.entry(name) {
            hash_map::Entry::Vacant(slot) => {
                slot.insert(item);
            }
            hash_map::Entry::Occupied(known) => violations.push(Violation {
                rule: Rule::SourceDuplicate,
                ..violation(section, known.key(), 0..0, "the name twice".into(), "unique names".into())
            }),
        }
    }
    map
}

impl BinRead for Text {
    type Args<'a> = ();

    fn read_options<R: Read + Seek>(reader: &mut R, endian: Endian, (): ()) -> BinResult<Self> {
        let start = reader.stream_position()?;
        let length = u64::read_options(reader, endian, ())?;
        let mut bytes = Vec::new();
        reader.by_ref().take(length).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != length {
            return Err(binrw::Error::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        String::from_utf8(bytes).map(Text).map_err(|error| {
            let bad = start + 8 + error.utf8_error().valid_up_to() as u64;
            custom("GGUF", "string", bad..bad + 1, "bytes that are not UTF-8".into(), "UTF-8".into())
        })
    }
}

impl BinWrite for Text {
    type Args<'a> = ();

    fn write_options<W: Write + Seek>(&self, writer: &mut W, endian: Endian, (): ()) -> BinResult<()> {
        (self.0.len() as u64).write_options(writer, endian, ())?;
        Ok(writer.write_all(self.0.as_bytes())?)
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Text {
        Text(text.into())
    }
}

#[binrw::parser(reader, endian)]
fn read_version() -> BinResult<u32> {
    let start = reader.stream_position()?;
    let version = u32::read_options(reader, endian, ())?;
    if version == VERSION {
        return Ok(version);
    }
    let found = match version.swap_bytes() {
        swapped @ 1..=VERSION => format!("version {swapped} in big-endian order"),
        _ => format!("version {version}"),
    };
    Err(custom(
        "GGUF header",
        "version",
        start..start + 4,
        found,
        format!("version {VERSION}, little-endian"),
    ))
}

#[binrw::parser(reader, endian)]
fn read_axes(count: u32) -> BinResult<Vec<u64>> {
    if count > MAX_AXES {
        let start = reader.stream_position()?.saturating_sub(4);
        let (found, needed) = (format!("{count} axes"), format!("at most {MAX_AXES}"));
        return Err(custom("GGUF tensor descriptions", "axes", start..start + 4, found, needed));
    }
    repeat(count.into(), |_| u64::read_options(reader, endian, ()))
}

/// `count` items, each named in the errors of its parts.
#[binrw::parser(reader, endian)]
fn items<T: for<'a> BinRead<Args<'a> = ()>>(section: &'static str, count: u64) -> BinResult<Vec<T>> {
    repeat(count, |index| {
        let start = reader.stream_position()?;
        T::read_options(reader, endian, ()).map_err(|error| match error.custom_err::<Violation>() {
            Some(known) => {
                let field = format!("entry {index}: {}", known.field);
                let violation = Violation { section: section.into(), field, ..known.clone() };
                binrw::Error::Custom { pos: start, err: Box::new(violation) }
            }
            None => {
                let found = if error.is_eof() {
                    format!(
                        "the end of the file, or {MAX_DESCRIPTION} bytes without an end of the descriptions"
                    )
                } else {
                    "bytes of no meaning".into()
                };
                custom(
                    section,
                    &format!("entry {index}"),
                    start..start + 1,
                    found,
                    format!("{count} whole entries"),
                )
            }
        })
    })
}

/// `count` values. Nothing is reserved: a hostile count meets the end of the file first, since no value is empty.
fn repeat<T>(count: u64, mut read: impl FnMut(u64) -> BinResult<T>) -> BinResult<Vec<T>> {
    let mut values = Vec::new();
    for index in 0..count {
        values.push(read(index)?);
    }
    Ok(values)
}

fn violation(section: &str, field: &str, range: Range<u64>, found: String, needed: String) -> Violation {
    Violation {
        rule: Rule::SourceContainer,
        section: section.into(),
        field: field.into(),
        range,
        found,
        needed,
    }
}

fn custom(section: &str, field: &str, range: Range<u64>, found: String, needed: String) -> binrw::Error {
    binrw::Error::Custom { pos: range.start, err: Box::new(violation(section, field, range, found, needed)) }
}

fn unknown_type(start: u64, id: u32) -> binrw::Error {
    custom(
        "GGUF metadata",
        "value type",
        start..start + 4,
        format!("type {id}"),
        "a type from 0 to 12".into(),
    )
}

/// The violation inside an error of the description, or one about the header before any entry.
fn violation_in(error: &binrw::Error, len: u64) -> Violation {
    match (error.custom_err::<Violation>(), error.root_cause()) {
        (Some(known), _) => known.clone(),
        (None, binrw::Error::BadMagic { .. }) => {
            violation("GGUF header", "magic", 0..4, "other bytes".into(), "`GGUF`".into())
        }
        _ => violation(
            "GGUF header",
            "counts",
            0..len,
            format!("a file of {len} bytes"),
            "a header of 24 bytes".into(),
        ),
    }
}
