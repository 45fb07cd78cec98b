//! Target `reader`.

use std::io::{self, Cursor};

use binrw::BinRead;
use formats::model_bin::dump::{Limits, dump};
use formats::model_bin::layout::File;
use formats::model_bin::section::{Content, SectionMap};
use formats::rules::{Level, Rule};
use formats::violation::Violation;

use crate::{bounded, edits};

/// Whatever the bytes, reading ends with positions inside the file or with a violation that names the place; the
/// section map covers each byte exactly once; the dump prints each once.
pub fn reader(data: &[u8]) {
    for bytes in edits::files(data) {
        bounded(bytes.len(), || {
            let map = SectionMap::read(&bytes);
            check_map(&map, bytes.len() as u64);
            match File::read_args(&mut Cursor::new(&bytes), binrw::args! { len: bytes.len() as u64 }) {
                Ok(file) => check_file(&file, &map, bytes.len() as u64),
                Err(error) => check_error(&error, bytes.len() as u64),
            }
            dump(&bytes, &mut io::sink(), Limits::default()).expect("a dump of every byte");
        });
    }
}

fn check_map(map: &SectionMap, len: u64) {
    let mut position = 0;
    for span in &map.spans {
        assert_eq!(span.range.start, position, "a gap or an overlap before {}", span.name);
        assert!(span.range.end >= position, "{} ends before it starts", span.name);
        assert!(!matches!(span.content, Content::Padding { .. }) || !span.range.is_empty());
        position = span.range.end;
    }
    assert_eq!(position, len, "the map ends elsewhere than the file");
    let sections: u64 = map.sections().map(|(_, range, _)| range.end - range.start).sum();
    assert_eq!(sections, len, "the sections do not add up to the file");
    for span in map.spans.iter().filter(|span| !span.range.is_empty()) {
        assert_eq!(map.owner(span.range.start), Some(span));
        assert_eq!(map.owner(span.range.end - 1), Some(span));
    }
    assert_eq!(map.owner(len), None);
}

fn check_file(file: &File, map: &SectionMap, len: u64) {
    let mut position = file.prefix.text_tokens.range.end;
    for tensor in file.weights.tensors() {
        assert_eq!(tensor.padding.range.start, position, "a gap before {}", tensor.id);
        assert_eq!(tensor.padding.range.end, tensor.range.start);
        assert!(tensor.range.start.is_multiple_of(tensor.align), "{} is not aligned", tensor.id);
        assert!(tensor.range.start - position < tensor.align, "too much padding before {}", tensor.id);
        let bytes: u64 = tensor.shape.iter().product::<u64>() * tensor.id.tensor.kind.dtype().size();
        assert_eq!(
            tensor.range.end - tensor.range.start,
            bytes,
            "{} has another size than its shape",
            tensor.id
        );
        assert_eq!(file.weights.piece(tensor.id), Some(tensor));
        position = tensor.range.end;
    }
    assert_eq!(position, file.weights.end());
    assert!(position <= len);
    assert_eq!(*map, SectionMap::of(file, len));
}

fn check_error(error: &binrw::Error, len: u64) {
    let violation = error.custom_err::<Violation>().expect("a violation, whatever went wrong");
    assert_eq!(violation.rule.level(), Level::Structure);
    assert!(violation.range.start < violation.range.end, "{violation} names no byte");
    // What is missing lies behind the end; anything else can be looked at.
    assert_eq!(
        violation.rule == Rule::Truncated,
        violation.range.end > len,
        "{violation} in a file of {len} bytes"
    );
}
