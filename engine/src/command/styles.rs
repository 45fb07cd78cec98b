//! Colours of the terminal.

use std::io;

use anstream::AutoStream;
use anstyle::{AnsiColor, Style};

/// Styles of the terminal; empty where it shall or can have none.
#[derive(Clone, Copy, Default)]
pub struct Styles {
    /// Whether there are any.
    pub on: bool,
    /// What matters.
    pub bold: Style,
    /// What does not.
    pub dim: Style,
    /// Calls and their results.
    pub call: Style,
    /// What is wrong.
    pub warning: Style,
    /// What was found right.
    pub good: Style,
}

impl Styles {
    /// Those for standard output: none where it is no terminal, or with NO_COLOR.
    pub fn of_stdout() -> Styles {
        if AutoStream::choice(&io::stdout()) == anstream::ColorChoice::Never {
            return Styles::default();
        }
        let color = |color: AnsiColor| Style::new().fg_color(Some(color.into()));
        Styles {
            on: true,
            bold: Style::new().bold(),
            dim: Style::new().dimmed(),
            call: color(AnsiColor::Cyan),
            warning: color(AnsiColor::Yellow),
            good: color(AnsiColor::Green),
        }
    }
}
