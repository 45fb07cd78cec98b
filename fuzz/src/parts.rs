//! A file that was read, in a form that can be compared: a NaN of its header is equal to itself.

use std::io::Cursor;

use binrw::BinWrite;
use formats::model_bin::layout::{Blob, File, Weights};

/// What [`File`] holds.
#[derive(Debug, PartialEq)]
pub(crate) struct Parts {
    head: Vec<u8>,
    blobs: [Blob; 3],
    weights: Weights,
}

impl From<File> for Parts {
    fn from(file: File) -> Parts {
        let mut head = Cursor::new(Vec::new());
        file.prefix.head.write(&mut head).expect("a head in memory");
        let prefix = file.prefix;
        let blobs = [prefix.special_uuids, prefix.regex, prefix.text_tokens];
        Parts { head: head.into_inner(), blobs, weights: file.weights }
    }
}
