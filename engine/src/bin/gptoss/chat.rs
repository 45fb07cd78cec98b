//! `chat`: a conversation in the terminal, or line by line through a pipe.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use engine::command::{Styles, interrupt};
use engine::gpt_oss::{Model, Session};
use engine::harmony::{Chat, Content, DeveloperContent, Encoding, Message, Role, SystemContent};
use formats::command::{Console, Outcome, explained};

use crate::conversation::{self, Effort, Opening};
use crate::input::{Input, Line};
use crate::options::{DeviceOptions, ModelOptions, SamplingOptions, Stops};
use crate::tools::{self, Tools};
use crate::turn;
use crate::view::{Lines, Stats, Text, View};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    device: DeviceOptions,
}

const HELP: &str = "\
/help                        this list
/reasoning low|medium|high   reasoning effort
/system TEXT                 who the model is
/developer TEXT              instructions
/tools FILE|demo|none        function tools: JSON descriptions, or the built-in ones, which run here
/undo                        take back the last message and what followed
/retry                       the last answer once more, with other random numbers
/save FILE, /load FILE       the conversation as Harmony JSON
/reset                       forget the conversation, keep the settings
/stats                       numbers of this session
/raw                         show tokens as they come, special ones by name; again to stop
/quit                        end; so does Ctrl-D. Ctrl-C ends an answer
A line that ends in \\ goes on in the next one.";

/// `gptoss chat`.
pub fn chat(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    arguments.sampling.options(0)?;
    let stored = arguments.model.open(console)?;
    let encoding = turn::encoding(&stored)?;
    let (chat, tools) = arguments.opening.chat(&encoding)?;
    let stops = arguments.sampling.stops(encoding.tokenizer())?;
    let model = arguments.device.load(&stored, console)?;
    let mut input = Input::new()?;
    if input.is_terminal() && !console.quiet {
        if arguments.model.model.is_none() {
            eprintln!("{}", crate::demo::INTRODUCTION);
        }
        eprintln!("/help lists commands.");
    }
    let mut talk = Talk {
        session: Session::new(&model),
        chat,
        tools,
        sampling: &arguments.sampling,
        stops,
        turns: 0,
        taken_back: None,
        totals: Stats::default(),
        screen: Screen { json: console.json, lines: Lines, text: Text::new(), styles: Styles::of_stdout() },
        encoding,
    };
    talk.screen.text.with_stats = !console.quiet;
    talk.run(&mut input)
}

/// Where turns are shown.
struct Screen {
    json: bool,
    lines: Lines,
    text: Text,
    styles: Styles,
}

impl Screen {
    fn view(&mut self) -> &mut dyn View {
        if self.json { &mut self.lines } else { &mut self.text }
    }

    /// What a command answers.
    fn say(&self, text: &str) -> io::Result<()> {
        if self.json {
            return Lines::write(&serde_json::json!({ "event": "command", "text": text }));
        }
        let dim = self.styles.dim;
        writeln!(io::stdout(), "{dim}{text}{dim:#}")
    }

    /// What went wrong, without ending the chat.
    fn complain(&self, error: &anyhow::Error) -> io::Result<()> {
        if self.json {
            return Lines::write(&serde_json::json!({ "event": "error", "error": explained(error) }));
        }
        let warning = self.styles.warning;
        writeln!(io::stdout(), "{warning}{}{warning:#}", explained(error))
    }
}

struct Talk<'m> {
    session: Session<'m>,
    chat: Chat,
    tools: Tools,
    sampling: &'m SamplingOptions,
    stops: Stops,
    /// Generations so far; each has random numbers of its own.
    turns: u64,
    /// A message that an interrupt or /undo took back.
    taken_back: Option<String>,
    /// Numbers of the session so far.
    totals: Stats,
    screen: Screen,
    encoding: Encoding,
}

enum Next {
    GoOn,
    Quit,
}

impl Talk<'_> {
    fn run(&mut self, input: &mut Input) -> Result<Outcome> {
        let mut failed = false;
        loop {
            let line = match input.line("› ")? {
                Line::Text(line) => line,
                Line::Interrupted => {
                    self.screen.say("/quit or Ctrl-D ends the chat")?;
                    continue;
                }
                Line::End => break,
            };
            let result = match line.trim().strip_prefix('/') {
                Some(command) => self.command(command, input),
                None if line.trim().is_empty() => Ok(Next::GoOn),
                None => self.ask(line, input).map(|()| Next::GoOn),
            };
            match result {
                Ok(Next::GoOn) => {}
                Ok(Next::Quit) => break,
                Err(error) if is_broken_pipe(&error) => return Err(error),
                Err(error) => {
                    failed = true;
                    self.screen.complain(&error)?;
                }
            }
        }
        // A script shall notice; a person has seen it.
        ensure!(!failed || input.is_terminal(), "not everything worked, see above");
        Ok(Outcome::Fine)
    }

    /// Lets the model answer a message of the user.
    fn ask(&mut self, text: String, input: &mut Input) -> Result<()> {
        self.taken_back = None;
        let before = self.chat.len();
        self.chat.add_user(text.as_str());
        let answered = self.answer(input);
        if let Err(error) = &answered {
            self.chat.truncate(before);
            self.taken_back = Some(text);
            if let Some(engine::Error::Device(_) | engine::Error::Sampling(_)) = error.downcast_ref() {
                // Nothing in the caches can be relied on.
                self.session = Session::new(self.session.model());
            }
        }
        answered
    }

    /// Generates until the model has given its final answer, tool calls included.
    fn answer(&mut self, input: &mut Input) -> Result<()> {
        let talk = turn::Talk {
            session: &mut self.session,
            chat: &mut self.chat,
            encoding: &self.encoding,
            sampling: self.sampling,
            stops: &self.stops,
            turns: &mut self.turns,
        };
        let built_in = self.tools.built_in;
        let answer = { talk }.answer(self.screen.view(), &mut |call, view| {
            let output = if built_in {
                Some(tools::run(call))
            } else {
                match input.line(&format!("{} → ", call.recipient))? {
                    Line::Text(text) => Some(text),
                    Line::Interrupted | Line::End => None,
                }
            };
            // What someone has just typed is on the screen already.
            if let Some(output) = output.as_deref().filter(|_| built_in || !input.is_terminal()) {
                view.result(call, output)?;
            }
            Ok(output)
        })?;
        answer.stats.iter().for_each(|stats| self.totals.add(stats));
        if !input.is_terminal() && answer.stats.last().is_some_and(Stats::is_cancelled) {
            interrupt::exit();
        }
        if answer.is_abandoned {
            self.take_back();
            self.screen.say("taken back; /retry asks again")?;
        }
        Ok(())
    }

    /// Removes the last message of the user and everything behind it.
    fn take_back(&mut self) -> bool {
        let last = self.chat.messages().rposition(|message| message.author.role == Role::User);
        let Some(last) = last else { return false };
        self.taken_back = self.chat.messages().nth(last).map(text_of);
        self.chat.truncate(last);
        true
    }

    fn command(&mut self, command: &str, input: &mut Input) -> Result<Next> {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        let needed = |what: &str| -> Result<()> {
            ensure!(!rest.is_empty(), "/{name}: found nothing behind it, needed {what}");
            Ok(())
        };
        match name {
            "help" => self.screen.say(HELP)?,
            "quit" | "exit" => return Ok(Next::Quit),
            "reasoning" => {
                let effort = Effort::from_str(rest, true)
                    .map_err(|_| anyhow::anyhow!("/reasoning: found {rest:?}, needed low, medium or high"))?;
                let system = self.chat.system().cloned().unwrap_or_else(SystemContent::new);
                self.chat.set_system(system.with_reasoning_effort(effort.into()))?;
                self.screen.say(&format!("reasoning effort: {rest}"))?;
            }
            "system" => {
                needed("a text that says who the model is")?;
                let system = self.chat.system().cloned().unwrap_or_else(SystemContent::new);
                self.chat.set_system(system.with_model_identity(rest))?;
                self.screen.say("the system message has changed")?;
            }
            "developer" => {
                needed("instructions")?;
                self.set_developer(Some(rest))?;
                self.screen.say("the developer message has changed")?;
            }
            "tools" => {
                needed("a JSON file, demo or none")?;
                let before = std::mem::replace(&mut self.tools, Tools::named(rest)?);
                if let Err(error) = self.set_developer(None) {
                    self.tools = before;
                    return Err(error.context(format!("/tools {rest}")));
                }
                let names: Vec<&str> =
                    self.tools.descriptions.iter().map(|tool| tool.name.as_str()).collect();
                self.screen.say(&match names.as_slice() {
                    [] => "no tools".to_string(),
                    names => format!("tools: {}", names.join(", ")),
                })?;
            }
            "undo" => {
                let done = self.take_back();
                self.screen.say(if done { "taken back" } else { "there is nothing to take back" })?;
            }
            "retry" => {
                // What was taken back already is what shall be asked again.
                if self.taken_back.is_none() {
                    self.take_back();
                }
                let text = self.taken_back.take().context("/retry: there is no message yet")?;
                self.ask(text, input)?;
            }
            "save" => {
                needed("a file's name")?;
                conversation::write(Path::new(rest), &self.chat.conversation())?;
                self.screen.say(&format!("{rest}: {} messages", self.chat.len()))?;
            }
            "load" => {
                needed("a file's name")?;
                let conversation = conversation::read(Path::new(rest))?;
                self.chat = Chat::from_conversation(&self.encoding, conversation)?;
                self.tools = Tools {
                    descriptions: self
                        .chat
                        .developer()
                        .and_then(|developer| developer.tools.as_ref()?.get("functions"))
                        .map(|functions| functions.tools.clone())
                        .unwrap_or_default(),
                    built_in: false,
                };
                self.screen.say(&format!("{rest}: {} messages", self.chat.len()))?;
            }
            "reset" => {
                let (system, developer) = (self.chat.system().cloned(), self.chat.developer().cloned());
                self.chat = Chat::new(&self.encoding);
                if let Some(system) = system {
                    self.chat.set_system(system)?;
                }
                if let Some(developer) = developer {
                    self.chat.set_developer(developer)?;
                }
                self.screen.say("forgotten")?;
            }
            "stats" => self.say_stats()?,
            "raw" => {
                let raw = !self.screen.text.raw;
                self.screen.text.raw = raw;
                self.screen.say(if raw { "tokens as they come" } else { "messages" })?;
            }
            _ => bail!("/{name} is no command; /help lists them"),
        }
        Ok(Next::GoOn)
    }

    /// Sets the developer message anew from instructions, if given, and the tools.
    fn set_developer(&mut self, instructions: Option<&str>) -> Result<()> {
        let old = self.chat.developer().cloned();
        if old.is_none() && instructions.is_none() && self.tools.descriptions.is_empty() {
            return Ok(());
        }
        let content =
            conversation::developer(old.unwrap_or_else(DeveloperContent::new), instructions, &self.tools);
        Ok(self.chat.set_developer(content)?)
    }

    fn say_stats(&self) -> Result<()> {
        let Stats { generations, reused, recomputed, prefilled, .. } = self.totals;
        let (model, session): (&Model, _) = (self.session.model(), &self.session);
        let text = format!(
            "{} messages; {} of {} tokens of context in use, {} snapshots\n\
             {generations} prompts: {reused} tokens reused, {recomputed} computed again, {prefilled} prefilled\n\
             prefill {:.0} tokens/s, decode {:.1} tokens/s on {} ({})",
            self.chat.len(),
            session.tokens().len(),
            model.context(),
            session.snapshots().count(),
            self.totals.prefill_rate(),
            self.totals.decode_rate(),
            model.device().name(),
            model.device().backend(),
        );
        Ok(self.screen.say(&text)?)
    }
}

/// Whether nobody reads any more.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// The text of a user's message.
fn text_of(message: &Message) -> String {
    let texts = message.content.iter().filter_map(|content| match content {
        Content::Text(text) => Some(text.text.as_str()),
        _ => None,
    });
    texts.collect::<Vec<_>>().join("\n")
}
