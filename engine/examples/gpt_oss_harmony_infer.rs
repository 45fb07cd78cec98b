//! A question and its answer through Harmony, streamed: `cargo run --release -p engine --example gpt_oss_harmony_infer -- "QUESTION"`.
//! GPT_OSS_DIR names a folder with a model.bin or with SafeTensors; without it the built-in demo model answers.
use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;

use engine::backend::Backend;
use engine::gpt_oss::{LoadOptions, Model, Request, Residency, Session, generate};
use engine::harmony::{Chat, Encoding, Event, ReasoningEffort, SystemContent, token};
use engine::{demo, sampling};
use formats::model_bin::{Stored, StoredOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let question = std::env::args().nth(1).unwrap_or_else(|| "What is 4567 + 891?".into());

    // Only what verification has passed can be loaded.
    let stored = match std::env::var_os("GPT_OSS_DIR").map(PathBuf::from) {
        Some(folder) => {
            let file = folder.join("model.bin");
            let path = if file.is_file() { file } else { folder };
            Stored::open(&path, &StoredOptions::default(), &())?
        }
        None => demo::open_cached(&())?,
    };
    let device = Backend::Cpu.open()?;
    let options = LoadOptions::default();
    eprint!("{}", Residency::plan(&stored, &options, &device)?);
    let model = Model::load(&stored, &options, &device, &())?;

    // The vocabulary is the model's own.
    let encoding = Encoding::new(stored.vocabulary())?;
    let mut chat = Chat::new(&encoding);
    chat.set_system(SystemContent::new().with_reasoning_effort(ReasoningEffort::Low))?;
    chat.add_user(question);

    let mut session = Session::new(&model);
    let advance = session.advance_to(&chat.prompt()?)?;
    let request =
        Request { sampling: sampling::Options::greedy(), max_tokens: 1000, stop: token::STOP.to_vec() };
    let mut parser = chat.parser();
    generate(&mut session, advance.logits, &request, &mut |step| {
        for event in parser.push(step.token) {
            match event {
                Event::Start(header) => print!("\n[{}] ", header.channel.as_deref().unwrap_or("no channel")),
                Event::Delta { text } => print!("{text}"),
                Event::End { .. } => {}
                Event::Notice(notice) => eprintln!("{notice}"),
            }
        }
        let _ = std::io::stdout().flush();
        ControlFlow::Continue(())
    })?;
    parser.finish();
    let reply = chat.apply(parser.into_turn())?;
    println!("\n({} messages, {} calls to answer)", reply.added, reply.calls.len());
    Ok(())
}
