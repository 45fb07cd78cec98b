//! Target `granularity`.

use std::fs;
use std::io::{BufReader, Cursor, Read, Seek};

use binrw::BinRead;
use formats::Violation;
use formats::model_bin::layout::File;
use formats::model_bin::model::Bytes;
use formats::model_bin::verify::{read_violation, verify};
use formats::model_bin::{Depth, Verified};

use crate::parts::Parts;
use crate::trickle::Trickle;
use crate::{edits, scratch};

/// A slice, a reader that yields a few bytes at a time, a file and a mapped file give the same sections or the same
/// violation.
pub fn granularity(data: &[u8]) {
    let most = data.first().copied().unwrap_or(1);
    let folder = scratch::folder();
    let path = folder.path().join("model.bin");
    for bytes in edits::files(data) {
        fs::write(&path, &bytes).expect("a file");
        let len = bytes.len() as u64;
        let slice = read(Cursor::new(&bytes), len);
        assert_eq!(read(Trickle::new(&bytes, most), len), slice, "{most} bytes at a time");
        let open = || fs::File::open(&path).expect("the file");
        assert_eq!(read(open(), len), slice, "a file");
        assert_eq!(read(BufReader::with_capacity(most.into(), open()), len), slice, "a buffered file");

        let report = verify(&bytes, Depth::Full, &());
        assert!(report.file.is_none() || report.file.clone().map(Parts::from) == slice.ok());
        let mapped = Bytes::map(&path).expect("the file, mapped");
        assert_eq!(verify(&mapped, Depth::Full, &()).violations, report.violations);
        match Verified::open(&path, Depth::Full, &()) {
            Ok(verified) => {
                assert_eq!((verified.bytes(), verified.notes()), (&bytes[..], &report.violations[..]))
            }
            Err(error) => assert_eq!(error.violations(), report.violations),
        }
    }
}

fn read(mut reader: impl Read + Seek, len: u64) -> Result<Parts, Violation> {
    File::read_args(&mut reader, binrw::args! { len })
        .map(Parts::from)
        .map_err(|error| read_violation(error, len))
}
