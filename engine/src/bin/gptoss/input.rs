//! Lines from the user: edited on a terminal, as they come elsewhere.

use std::io::{self, BufRead, IsTerminal};

use anyhow::{Context, Result};
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};

/// What the user gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// Text, lines that end in a backslash joined with the next.
    Text(String),
    /// Ctrl-C at the prompt.
    Interrupted,
    /// Nothing more will come.
    End,
}

/// Where lines come from.
pub enum Input {
    /// Someone types: line editing, and a history of this session.
    Terminal(Box<Editor<(), MemHistory>>),
    /// A pipe or a file, and how many lines of it were read.
    Stream(Box<dyn BufRead>, usize),
}

impl Input {
    /// Standard input.
    pub fn new() -> Result<Input> {
        if !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
            return Ok(Input::Stream(Box::new(io::stdin().lock()), 0));
        }
        let config = Config::builder().auto_add_history(true).build();
        Ok(Input::Terminal(Box::new(Editor::with_history(config, MemHistory::new())?)))
    }

    /// Whether someone types.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Input::Terminal(_))
    }

    /// The next line.
    pub fn line(&mut self, prompt: &str) -> Result<Line> {
        let mut text = String::new();
        loop {
            let prompt = if text.is_empty() { prompt } else { "… " };
            match self.physical_line(prompt)? {
                Line::Text(line) => match line.strip_suffix('\\') {
                    Some(line) => {
                        text.push_str(line);
                        text.push('\n');
                    }
                    None => return Ok(Line::Text(text + &line)),
                },
                Line::End if !text.is_empty() => return Ok(Line::Text(text)),
                other => return Ok(other),
            }
        }
    }

    fn physical_line(&mut self, prompt: &str) -> Result<Line> {
        match self {
            Input::Terminal(editor) => match editor.readline(prompt) {
                Ok(line) => Ok(Line::Text(line)),
                Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(error) => Err(error.into()),
            },
            Input::Stream(stream, lines) => {
                let mut bytes = Vec::new();
                if stream.read_until(b'\n', &mut bytes)? == 0 {
                    return Ok(Line::End);
                }
                *lines += 1;
                let line = String::from_utf8(bytes)
                    .with_context(|| format!("line {lines} of standard input: needed UTF-8"))?;
                let line = line.strip_suffix('\n').unwrap_or(&line);
                Ok(Line::Text(line.strip_suffix('\r').unwrap_or(line).to_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backslash_joins_lines() {
        let text: &[u8] = b"one\\\ntwo\r\n\nthree\\";
        let mut input = Input::Stream(Box::new(text), 0);
        let mut line = || input.line("> ").unwrap();
        assert_eq!(line(), Line::Text("one\ntwo".into()));
        assert_eq!(line(), Line::Text(String::new()));
        assert_eq!(line(), Line::Text("three\n".into()));
        assert_eq!(line(), Line::End);
    }

    #[test]
    fn a_line_that_is_no_text_is_named() {
        let text: &[u8] = b"one\n\xff\nthree";
        let mut input = Input::Stream(Box::new(text), 0);
        assert_eq!(input.line("> ").unwrap(), Line::Text("one".into()));
        assert_eq!(input.line("> ").unwrap_err().to_string(), "line 2 of standard input: needed UTF-8");
        assert_eq!(input.line("> ").unwrap(), Line::Text("three".into()));
    }
}
