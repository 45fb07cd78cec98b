//! A reader that hands out few bytes at a time, as a pipe or a busy disk would.

use std::io::{self, Cursor, ErrorKind, Read, Seek, SeekFrom};

/// Yields 1 to `most` bytes for each call, now and then none with [`ErrorKind::Interrupted`].
pub(crate) struct Trickle<'a> {
    bytes: Cursor<&'a [u8]>,
    most: usize,
    calls: usize,
}

impl Trickle<'_> {
    pub(crate) fn new(bytes: &[u8], most: u8) -> Trickle<'_> {
        Trickle { bytes: Cursor::new(bytes), most: usize::from(most.max(1)), calls: 0 }
    }
}

impl Read for Trickle<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.calls += 1;
        if self.calls.is_multiple_of(7) {
            return Err(ErrorKind::Interrupted.into());
        }
        let len = out.len().min(1 + self.calls % self.most);
        self.bytes.read(&mut out[..len])
    }
}

impl Seek for Trickle<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.bytes.seek(to)
    }
}
