//! How turns are shown: text for people, JSON lines for programs.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use anstyle::Style;
use engine::command::Styles;
use engine::gpt_oss::{Step, Stop};
use engine::harmony::{Event, Header, Notice, Problem, ToolCall};
use formats::command::bar;
use indicatif::ProgressBar;
use serde::Serialize;

/// Numbers of a generation, or of several together.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    /// How many generations these are the numbers of.
    #[serde(skip)]
    pub generations: usize,
    /// Generated tokens but for the first of each generation.
    #[serde(skip)]
    pub decoded: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Those whose keys and values were in the cache.
    pub reused: usize,
    /// Those that were known and had to be computed again.
    pub recomputed: usize,
    /// Those that were new.
    pub prefilled: usize,
    /// Tokens that were generated.
    pub generated: usize,
    /// Why it (the last one) ended; nothing if a text of --stop did it.
    pub stop: Option<Stop>,
    /// From the prompt to the first token.
    pub prefill_seconds: f64,
    /// From the first token to the last.
    pub decode_seconds: f64,
}

impl Stats {
    /// New and recomputed tokens of the prompt for each second.
    pub fn prefill_rate(&self) -> f64 {
        rate(self.recomputed + self.prefilled, self.prefill_seconds)
    }

    /// Tokens after the first for each second.
    pub fn decode_rate(&self) -> f64 {
        rate(self.decoded, self.decode_seconds)
    }

    /// Adds what came next.
    pub fn add(&mut self, next: &Stats) {
        self.generations += next.generations;
        self.decoded += next.decoded;
        self.prompt += next.prompt;
        self.reused += next.reused;
        self.recomputed += next.recomputed;
        self.prefilled += next.prefilled;
        self.generated += next.generated;
        self.stop = next.stop;
        self.prefill_seconds += next.prefill_seconds;
        self.decode_seconds += next.decode_seconds;
    }

    /// Whether an interrupt ended it.
    pub fn is_cancelled(&self) -> bool {
        self.stop == Some(Stop::Cancelled)
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let again = match self.recomputed {
            0 => String::new(),
            count => format!(", {count} computed again (no snapshot was nearer)"),
        };
        let decode = match self.generated {
            0 | 1 => String::new(),
            _ => format!(", {:.1} tokens/s", self.decode_rate()),
        };
        let prompt = match self.generations {
            0 | 1 => "prompt".to_string(),
            count => format!("{count} prompts"),
        };
        let why = match self.stop {
            Some(Stop::Token(_)) => "",
            Some(Stop::MaxTokens) => "; ended by --max-tokens",
            Some(Stop::ContextFull) => "; the context is full (--context, or /reset)",
            Some(Stop::Cancelled) => "; cancelled",
            None => "; ended by --stop",
        };
        format!(
            "{} tokens{decode}; {prompt} of {}: {} reused{again}, {} prefilled at {:.0} tokens/s{why}",
            self.generated,
            self.prompt,
            self.reused,
            self.prefilled,
            self.prefill_rate(),
        )
    }
}

/// Units for each second, 0 where no time has passed.
pub fn rate(count: usize, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

/// Someone who watches a turn.
pub trait View {
    /// So many tokens of a long prompt are in the cache.
    fn prefill(&mut self, done: usize, total: usize) -> io::Result<()>;
    /// A token was chosen; `text` is what is new of the text, special tokens by their names.
    fn token(&mut self, step: &Step, text: &str) -> io::Result<()>;
    /// Text that belongs to no conversation.
    fn plain(&mut self, text: &str) -> io::Result<()>;
    /// Something was understood.
    fn event(&mut self, event: &Event) -> io::Result<()>;
    /// A tool answered.
    fn result(&mut self, call: &ToolCall, output: &str) -> io::Result<()>;
    /// A generation is over; more may follow before there is an answer.
    fn generated(&mut self, stats: &Stats) -> io::Result<()>;
    /// There is an answer, or nothing more will come: the numbers of all its generations.
    fn answered(&mut self, stats: &[Stats]) -> io::Result<()>;
}

/// Text on standard output: channels by style, or by labels where there are no styles.
pub struct Text {
    styles: Styles,
    /// Whether tokens are shown as they are.
    pub raw: bool,
    /// Whether nothing but the final answer is shown.
    pub final_only: bool,
    /// Whether statistics go to standard error.
    pub with_stats: bool,
    open: Option<Opened>,
    at_line_start: bool,
    /// Whether a terminal would obey control characters.
    is_terminal: bool,
    prefill: Option<ProgressBar>,
}

/// The message that is being shown.
struct Opened {
    style: Style,
    /// What begins each of its lines.
    margin: &'static str,
    shown: bool,
}

impl Text {
    /// Shows everything, channels apart.
    pub fn new() -> Text {
        Text {
            styles: Styles::of_stdout(),
            raw: false,
            final_only: false,
            with_stats: true,
            open: None,
            at_line_start: true,
            is_terminal: io::stdout().is_terminal(),
            prefill: None,
        }
    }

    /// This, or JSON lines in its place.
    pub fn or_lines(self, json: bool) -> Box<dyn View> {
        if json { Box::new(Lines) } else { Box::new(self) }
    }

    /// Removes the bar.
    fn prefilled(&mut self) {
        if let Some(bar) = self.prefill.take() {
            bar.finish_and_clear();
        }
    }

    /// A text without what a terminal would obey: a model shall not move the cursor or change its title.
    fn harmless<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let is_order = |c: char| c.is_control() && c != '\n' && c != '\t';
        if !self.is_terminal || !text.contains(is_order) {
            return text.into();
        }
        let shown = |c: char| match u32::from(c) {
            _ if !is_order(c) => c,
            // Unicode has pictures of them.
            code @ 0..0x20 => char::from_u32(0x2400 + code).unwrap_or(char::REPLACEMENT_CHARACTER),
            0x7f => '\u{2421}',
            _ => char::REPLACEMENT_CHARACTER,
        };
        text.chars().map(shown).collect()
    }

    fn open(&mut self, header: &Header) -> io::Result<()> {
        let styles = self.styles;
        let channel = header.channel.as_deref().unwrap_or("no channel");
        let recipient = header.recipient.as_deref().filter(|_| header.is_call());
        let (style, margin, title) = match (recipient, channel) {
            (Some(name), _) if styles.on => (styles.call, "│ ", format!("╭ {name}\n│ ")),
            (Some(name), _) => (Style::new(), "", format!("[call {name}] ")),
            (None, "analysis") if styles.on => (styles.dim, "", String::new()),
            (None, "final") if styles.on => (styles.bold, "", String::new()),
            (None, _) if styles.on => (Style::new().italic(), "", String::new()),
            (None, channel) => (Style::new(), "", format!("[{channel}] ")),
        };
        let shown = !self.final_only || recipient.is_none() && channel == "final";
        if shown {
            self.fresh_line()?;
            if !self.final_only {
                let title = self.harmless(&title);
                write!(io::stdout(), "{style}{title}{style:#}")?;
                self.at_line_start = title.is_empty();
            }
        }
        self.open = Some(Opened { style, margin, shown });
        Ok(())
    }

    fn delta(&mut self, text: &str) -> io::Result<()> {
        let Some(Opened { style, margin, shown: true }) = &self.open else { return Ok(()) };
        let mut out = io::stdout().lock();
        let text = self.harmless(text);
        for (index, line) in text.split('\n').enumerate() {
            if index > 0 {
                write!(out, "\n{style}{margin}{style:#}")?;
            }
            write!(out, "{style}{line}{style:#}")?;
        }
        self.at_line_start = text.ends_with('\n') && margin.is_empty();
        out.flush()
    }

    /// Begins a line unless one has begun.
    fn fresh_line(&mut self) -> io::Result<()> {
        if !std::mem::replace(&mut self.at_line_start, true) {
            writeln!(io::stdout())?;
        }
        io::stdout().flush()
    }
}

impl View for Text {
    fn prefill(&mut self, done: usize, total: usize) -> io::Result<()> {
        if !self.with_stats {
            return Ok(());
        }
        let bar = match self.prefill.take() {
            Some(bar) => bar,
            None if !io::stderr().is_terminal() => {
                writeln!(io::stderr(), "prompt: {} new tokens", total - done)?;
                ProgressBar::hidden()
            }
            None => bar("prompt", total as u64, "{pos:>7} of {len} tokens  {per_sec}"),
        };
        bar.set_position(done as u64);
        self.prefill = Some(bar);
        Ok(())
    }

    fn token(&mut self, _: &Step, text: &str) -> io::Result<()> {
        self.prefilled();
        if self.raw { self.plain(text) } else { Ok(()) }
    }

    fn plain(&mut self, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.at_line_start = text.ends_with('\n');
        let mut out = io::stdout().lock();
        out.write_all(self.harmless(text).as_bytes())?;
        out.flush()
    }

    fn event(&mut self, event: &Event) -> io::Result<()> {
        if self.raw {
            return Ok(());
        }
        match event {
            Event::Start(header) => self.open(header),
            Event::Delta { text } => self.delta(text),
            Event::End { .. } => match self.open.take() {
                Some(Opened { shown: true, .. }) => self.fresh_line(),
                _ => Ok(()),
            },
            Event::Notice(_) if self.final_only => Ok(()),
            // The statistics say why.
            Event::Notice(Notice { problem: Problem::Truncated, .. }) => self.fresh_line(),
            Event::Notice(notice) => {
                self.fresh_line()?;
                let style = self.styles.warning;
                let notice = notice.to_string();
                writeln!(io::stdout(), "{style}[malformed] {}{style:#}", self.harmless(&notice))
            }
        }
    }

    fn result(&mut self, call: &ToolCall, output: &str) -> io::Result<()> {
        if self.final_only {
            return Ok(());
        }
        self.fresh_line()?;
        let style = self.styles.call;
        if self.styles.on {
            let output = self.harmless(output.trim_end()).replace('\n', "\n  ");
            writeln!(io::stdout(), "{style}╰{style:#} {output}")
        } else {
            let (name, output) = (self.harmless(&call.recipient), self.harmless(output));
            writeln!(io::stdout(), "[result {name}] {output}")
        }
    }

    fn generated(&mut self, _: &Stats) -> io::Result<()> {
        self.prefilled();
        self.fresh_line()
    }

    fn answered(&mut self, stats: &[Stats]) -> io::Result<()> {
        if !self.with_stats || stats.is_empty() {
            return Ok(());
        }
        let mut all = Stats::default();
        stats.iter().for_each(|stats| all.add(stats));
        let style = self.styles.dim;
        writeln!(anstream::stderr(), "{style}{}{style:#}", all.line())
    }
}

/// One JSON object on each line.
pub struct Lines;

impl Lines {
    /// Writes one object.
    pub fn write(value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_string(value)?;
        line.push('\n');
        let mut out = io::stdout().lock();
        out.write_all(line.as_bytes())?;
        out.flush()
    }
}

impl View for Lines {
    fn prefill(&mut self, done: usize, total: usize) -> io::Result<()> {
        Lines::write(&serde_json::json!({ "event": "prefill", "done": done, "total": total }))
    }

    fn token(&mut self, step: &Step, text: &str) -> io::Result<()> {
        let mut event = serde_json::json!({
            "event": "token", "token": step.token, "text": text, "logprob": step.sampled.logprob,
        });
        if !step.sampled.top_logprobs.is_empty() {
            let top = step.sampled.top_logprobs.iter();
            event["top_logprobs"] = top
                .map(|(token, logprob)| serde_json::json!({ "token": token, "logprob": logprob }))
                .collect();
        }
        Lines::write(&event)
    }

    fn plain(&mut self, text: &str) -> io::Result<()> {
        if text.is_empty() { Ok(()) } else { self.event(&Event::Delta { text: text.into() }) }
    }

    fn event(&mut self, event: &Event) -> io::Result<()> {
        Lines::write(event)
    }

    fn result(&mut self, call: &ToolCall, output: &str) -> io::Result<()> {
        Lines::write(&serde_json::json!({ "event": "result", "recipient": call.recipient, "output": output }))
    }

    fn answered(&mut self, _: &[Stats]) -> io::Result<()> {
        Ok(())
    }

    fn generated(&mut self, stats: &Stats) -> io::Result<()> {
        #[derive(Serialize)]
        struct Done<'a> {
            event: &'static str,
            #[serde(flatten)]
            stats: &'a Stats,
        }
        Lines::write(&Done { event: "done", stats })
    }
}
