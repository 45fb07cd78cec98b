//! `schedulers/`: schedules, and whole runs step by step.

use burn::tensor::{FloatDType, Tensor};
use serde::Deserialize;

use super::Context;
use crate::backend::Float;
use crate::diffusion::scheduler::{
    FlowMatchEuler, FlowMatchHeun, Kind, PingPong, Schedule, Scheduler, Shifting, omega_factor,
};
use crate::error::Result;
use crate::reference::{Comparison, Reference, Tolerance};
use crate::weights::read_json;

const TIMESTEPS: Tolerance = Tolerance { absolute: 1e-3, relative: 0.0 };
const SIGMAS: Tolerance = Tolerance { absolute: 1e-6, relative: 0.0 };
const STEPS: Tolerance = Tolerance::of(1e-4);
/// A unit in the last place of what is summed, which is larger than 1 where sums are small.
const BF16: Tolerance = Tolerance { absolute: 1.0 / 128.0, relative: 1.0 / 128.0 };

#[derive(Deserialize)]
struct Fixture {
    schedules: Vec<Row>,
    step_runs: Vec<StepRun>,
    scale_noise: Vec<ScaleNoise>,
    ctor_table_euler_shift3: Table,
    omega_logistic: Vec<Omega>,
}

#[derive(Deserialize)]
struct Row {
    kind: Kind,
    shift: f32,
    sigma_max_arg: f32,
    mu: Option<f64>,
    custom_sigmas_in: Option<Vec<f32>>,
    num_inference_steps: usize,
    ctor_sigma_min: Option<f32>,
    ctor_sigma_max: Option<f32>,
    timesteps: Vec<f32>,
    sigmas: Vec<f32>,
}

#[derive(Deserialize)]
struct StepRun {
    key: String,
    kind: Kind,
    shift: f32,
    num_inference_steps: usize,
    omega: f32,
    calls: Option<usize>,
    start_timestep_index: Option<usize>,
    step_index_after: Option<usize>,
}

#[derive(Deserialize)]
struct ScaleNoise {
    kind: Kind,
    shift: f32,
    num_inference_steps: usize,
    timesteps: Vec<f32>,
}

#[derive(Deserialize)]
struct Table {
    first: Vec<f32>,
    last: Vec<f32>,
    timesteps_last: Vec<f32>,
}

#[derive(Deserialize)]
struct Omega {
    omega: f32,
    value: f64,
}

fn scheduler(kind: Kind, schedule: Schedule) -> Box<dyn Scheduler> {
    match kind {
        Kind::Euler => Box::new(FlowMatchEuler::new(schedule)),
        Kind::Heun => Box::new(FlowMatchHeun::new(schedule)),
        Kind::PingPong => Box::new(PingPong::new(schedule)),
    }
}

pub(super) fn check(context: &Context<'_>) -> Result<Vec<Comparison>> {
    let folder = context.path("schedulers");
    let fixture: Fixture = read_json(&folder.join("schedules.json"))?;
    let io = Reference::open(&folder.join("steps.safetensors"))?;
    let mut found = Vec::new();
    for (index, row) in fixture.schedules.iter().enumerate() {
        found.extend(schedule(index, row)?);
    }
    let table = scheduler(Kind::Euler, Schedule::new(3.0, 1.0, Shifting::Static)?);
    let (levels, times) = (table.schedule().training(), table.timesteps());
    let Table { first, last, timesteps_last } = &fixture.ctor_table_euler_shift3;
    let end = levels.len() - last.len();
    found.push(Comparison::of("ctor_table.first", &levels[..first.len()], first, SIGMAS));
    found.push(Comparison::of("ctor_table.last", &levels[end..], last, SIGMAS));
    found.push(Comparison::of("ctor_table.timesteps_last", &times[end..], timesteps_last, TIMESTEPS));
    for Omega { omega, value } in &fixture.omega_logistic {
        let name = format!("omega.{omega}");
        found.push(Comparison::of(&name, &[omega_factor(*omega) as f32], &[*value as f32], SIGMAS));
    }
    for run in &fixture.step_runs {
        if run.key != "bf16" || context.device.supports(Float::Bf16) {
            found.extend(steps(run, &io, context)?);
        }
    }
    let device = context.device.burn();
    for case in &fixture.scale_noise {
        let mut scheduler = scheduler(case.kind, Schedule::new(case.shift, 1.0, Shifting::Static)?);
        scheduler.set_timesteps(case.num_inference_steps)?;
        let (data, noise) =
            (io.tensor("scale_noise.sample", device)?, io.tensor("scale_noise.noise", device)?);
        let noisy = scheduler.scale_noise(data, noise, &case.timesteps)?;
        found.push(io.compare("scale_noise.out", noisy, STEPS)?);
    }
    Ok(found)
}

fn schedule(index: usize, row: &Row) -> Result<Vec<Comparison>> {
    let shifting = row.mu.map_or(Shifting::Static, |mu| Shifting::Dynamic { mu });
    let mut scheduler = scheduler(row.kind, Schedule::new(row.shift, row.sigma_max_arg, shifting)?);
    match &row.custom_sigmas_in {
        Some(sigmas) => scheduler.set_sigmas(sigmas)?,
        None => scheduler.set_timesteps(row.num_inference_steps)?,
    }
    let name = |what: &str| format!("schedules.{index}.{}.{what}", row.kind.name());
    let mut found = vec![
        Comparison::of(&name("timesteps"), scheduler.timesteps(), &row.timesteps, TIMESTEPS),
        Comparison::of(&name("sigmas"), scheduler.sigmas(), &row.sigmas, SIGMAS),
    ];
    let ends = [
        ("sigma_min", scheduler.sigma_min(), row.ctor_sigma_min),
        ("sigma_max", scheduler.sigma_max(), row.ctor_sigma_max),
    ];
    for (what, level, truth) in ends {
        found.extend(truth.map(|truth| Comparison::of(&name(what), &[level], &[truth], SIGMAS)));
    }
    Ok(found)
}

/// A run, or a single step that begins in the middle of one.
fn steps(run: &StepRun, io: &Reference, context: &Context<'_>) -> Result<Vec<Comparison>> {
    let StepRun { key, omega, .. } = run;
    let device = context.device.burn();
    let mut scheduler = scheduler(run.kind, Schedule::new(run.shift, 1.0, Shifting::Static)?);
    scheduler.set_timesteps(run.num_inference_steps)?;
    let (float, tolerance) = if key == "bf16" { (FloatDType::BF16, BF16) } else { (FloatDType::F32, STEPS) };
    let tensor = |name: &str| Ok::<_, crate::Error>(io.tensor::<4>(name, device)?.cast(float));
    let noise = |name: &str| io.has(name).then(|| tensor(name)).transpose();
    let f32 = |x: Tensor<4>| x.cast(FloatDType::F32);
    if let Some(start) = run.start_timestep_index {
        let [sample, velocity] = [tensor(&format!("{key}.sample"))?, tensor(&format!("{key}.model_output"))?];
        let time = scheduler.timesteps()[start];
        let next = scheduler.step(velocity, time, sample, *omega, noise(&format!("{key}.noise"))?)?;
        let index = scheduler.schedule().index();
        return Ok(vec![
            io.compare(&format!("{key}.prev_sample"), f32(next), tolerance)?,
            Comparison::same(&format!("{key}.step_index"), &index, &run.step_index_after),
        ]);
    }
    let mut sample = tensor(&format!("{key}.sample0"))?;
    let mut found = Vec::new();
    for call in 0..run.calls.unwrap_or(0) {
        let velocity = tensor(&format!("{key}.model_output.{call}"))?;
        let time = scheduler.timesteps()[call];
        let noise = noise(&format!("{key}.noise.{call}"))?;
        let next = scheduler.step(velocity, time, sample, *omega, noise)?;
        let name = format!("{key}.prev_sample.{call}");
        found.push(io.compare(&name, f32(next), tolerance)?);
        // The original's, so that a step's error is its own.
        sample = tensor(&name)?;
    }
    Ok(found)
}
