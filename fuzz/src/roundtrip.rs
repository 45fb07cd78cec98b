//! Target `roundtrip`.

use std::io::{self, Cursor, Write};
use std::ops::Range;
use std::path::Path;

use binrw::{BinRead, BinWrite};
use formats::model_bin::layout::{BlobId, File, Payload, PieceId};
use formats::model_bin::{Depth, Verified};

use crate::parts::Parts;
use crate::{bounded, edits, tiny};

/// What the description reads it writes again, byte for byte but for trailing bytes and for paddings, which it writes
/// as zeros. A valid file is also what the exporter makes of the model in it, unless values of Q or K are ambiguous.
pub fn roundtrip(data: &[u8]) {
    for bytes in edits::files(data) {
        let read =
            |bytes: &[u8]| File::read_args(&mut Cursor::new(bytes), binrw::args! { len: bytes.len() as u64 });
        let Ok(file) = read(&bytes) else { continue };
        let mut written = Cursor::new(Vec::new());
        bounded(bytes.len(), || file.write_le_args(&mut written, &Original { bytes: &bytes, file: &file }))
            .expect("a file that was read");
        let written = written.into_inner();

        let mut expected = bytes[..file.weights.end() as usize].to_vec();
        for tensor in file.weights.tensors() {
            expected[of(&tensor.padding.range)].fill(0);
        }
        if let Some(at) = written.iter().zip(&expected).position(|(a, b)| a != b) {
            panic!("byte {at} differs");
        }
        assert_eq!(written.len(), expected.len());
        let again = read(&written).expect("a file that was written");
        assert!(again.weights.tensors().all(|tensor| tensor.padding.nonzero.is_none()));
        if expected == bytes {
            assert_eq!(Parts::from(again), Parts::from(file));
        }

        if let Ok(verified) = Verified::from_bytes(Path::new("fuzzed.bin"), bytes, Depth::Full)
            && verified.ambiguous_qkv().is_empty()
        {
            let exported = tiny::model_bin(&verified).expect("a valid model");
            assert!(exported == verified.bytes(), "a valid file, exported again, is another");
        }
    }
}

/// The payload of a file that was read: its own bytes.
struct Original<'a> {
    bytes: &'a [u8],
    file: &'a File,
}

impl Payload for Original<'_> {
    fn write_blob(&self, blob: BlobId, out: &mut dyn Write) -> io::Result<()> {
        let prefix = &self.file.prefix;
        let range = match blob {
            BlobId::SpecialUuids => &prefix.special_uuids.range,
            BlobId::Regex => &prefix.regex.range,
            BlobId::TextTokens => &prefix.text_tokens.range,
        };
        out.write_all(&self.bytes[of(range)])
    }

    fn write_piece(&self, piece: PieceId, out: &mut dyn Write) -> io::Result<()> {
        let tensor = self.file.weights.piece(piece).expect("a piece that the description has");
        out.write_all(&self.bytes[of(&tensor.range)])
    }
}

fn of(range: &Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}
