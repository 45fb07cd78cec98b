//! Completions and the manual, made from a command's own arguments.

use std::io::{self, Write};

use anyhow::Result;
use clap::{Command, Subcommand};

use super::Outcome;

/// What a command can print about itself.
#[derive(Subcommand, Clone, Copy, Debug)]
pub enum Pages {
    /// Print shell completions.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page of this command and its verbs, in roff.
    Man,
}

impl Pages {
    /// Prints the page for `command` on standard output.
    ///
    /// # Errors
    /// Standard output cannot be written to.
    pub fn print(self, mut command: Command) -> Result<Outcome> {
        let mut page = Vec::new();
        match self {
            Pages::Completions { shell } => {
                let name = command.get_name().to_owned();
                clap_complete::generate(shell, &mut command, name, &mut page);
            }
            // The page of the command, then one of each verb.
            Pages::Man => {
                command.build();
                clap_mangen::Man::new(command.clone()).render(&mut page)?;
                for verb in command.get_subcommands() {
                    clap_mangen::Man::new(verb.clone()).render(&mut page)?;
                }
            }
        }
        let mut out = io::stdout().lock();
        out.write_all(&page)?;
        out.flush()?;
        Ok(Outcome::Fine)
    }
}
