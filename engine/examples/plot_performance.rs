//! The plot of docs/performance.md, made from docs/performance.json: `cargo run --release -p engine --example plot_performance`.
//!
//! ```text
//! what is measured       ▆▆▆▆▆▆|▆▆▆▆▆  ▼       ours, with a tick at what it must reach and an arrow at the aim
//! on which device        ▆▆▆▆▆▆▆               a peer
//!                        ────────────────────  the limit of the hardware
//! ```
//! Each row has an axis of its own, from nothing to the limit or to the largest of its values.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::Deserialize;

/// What docs/performance.json holds.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    title: String,
    rows: Vec<Row>,
}

/// A measurement and what it is compared with.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    what: String,
    device: String,
    unit: String,
    /// `None` where it has not been measured.
    ours: Option<f64>,
    peer: Option<Peer>,
    /// What the bytes or the operations allow.
    limit: Option<f64>,
    must: Option<f64>,
    aim: Option<f64>,
    /// Prints ours.
    #[allow(dead_code)]
    command: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    name: String,
    value: f64,
}

impl Row {
    fn height(&self) -> i32 {
        (2 + i32::from(self.peer.is_some())) * PITCH + GAP
    }
}

/// Colours in daylight, and in the dark, for which a style sheet exchanges them.
const COLOURS: [(RGBColor, RGBColor); 7] = [
    (BACKGROUND, RGBColor(0x0d, 0x11, 0x17)),
    (TEXT, RGBColor(0xe6, 0xed, 0xf3)),
    (MUTED, RGBColor(0x9a, 0xa4, 0xaf)),
    (OURS, RGBColor(0x4c, 0x9a, 0xff)),
    (PEER, RGBColor(0x6e, 0x76, 0x81)),
    (LIMIT, RGBColor(0x30, 0x36, 0x3d)),
    (GOAL, RGBColor(0xff, 0xa6, 0x57)),
];
const BACKGROUND: RGBColor = RGBColor(0xff, 0xff, 0xfe);
const TEXT: RGBColor = RGBColor(0x1f, 0x23, 0x28);
const MUTED: RGBColor = RGBColor(0x59, 0x63, 0x6e);
const OURS: RGBColor = RGBColor(0x0a, 0x5d, 0xc2);
const PEER: RGBColor = RGBColor(0x9a, 0xa3, 0xad);
const LIMIT: RGBColor = RGBColor(0xdf, 0xe4, 0xea);
const GOAL: RGBColor = RGBColor(0xc2, 0x4e, 0x00);

const WIDTH: i32 = 960;
const MARGIN: i32 = 24;
/// Where bars begin and where the longest ends, then numbers.
const BARS: std::ops::Range<i32> = 322..704;
/// Of a bar, and from one to the next.
const BAR: i32 = 12;
const PITCH: i32 = 17;
/// Of the title and the legend, and between rows.
const HEAD: i32 = 86;
const GAP: i32 = 22;

type Canvas<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn main() -> Result<(), Box<dyn Error>> {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let document: Document = serde_json::from_slice(&std::fs::read(docs.join("performance.json"))?)?;
    let plot = docs.join("performance.svg");
    std::fs::write(&plot, with_dark_mode(&draw(&document)?))?;
    println!("{}", plot.display());
    Ok(())
}

/// The plot in daylight.
fn draw(document: &Document) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    let height = HEAD + document.rows.iter().map(Row::height).sum::<i32>() + MARGIN / 2 - GAP / 2;
    {
        let canvas = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area();
        canvas.fill(&BACKGROUND)?;
        text(&canvas, &document.title, (MARGIN, 30), 21.0, TEXT, FontStyle::Bold)?;
        legend(&canvas, document)?;
        let mut top = HEAD;
        for row in &document.rows {
            draw_row(&canvas, row, top)?;
            top += row.height();
        }
        canvas.present()?;
    }
    Ok(svg)
}

/// What the colours are.
fn legend(canvas: &Canvas<'_>, document: &Document) -> Result<(), Box<dyn Error>> {
    let peer = document.rows.iter().find_map(|row| row.peer.as_ref()).map_or("peer", |peer| &peer.name);
    let y = 60;
    let mut x = MARGIN;
    for (colour, name) in [(OURS, "this engine"), (PEER, peer), (LIMIT, "limit of the hardware")] {
        bar(canvas, x..x + BAR, y - BAR / 2..y + BAR / 2, colour)?;
        text(canvas, name, (x + BAR + 7, y), 15.0, TEXT, FontStyle::Normal)?;
        x += BAR + 7 + name.len() as i32 * 7 + 20;
    }
    for (is_must, name) in [(true, "must reach"), (false, "aim")] {
        let top = if is_must { y - BAR / 2 } else { y + 3 };
        goal(canvas, x, top, is_must)?;
        text(canvas, name, (x + 11, y), 15.0, TEXT, FontStyle::Normal)?;
        x += 11 + name.len() as i32 * 7 + 20;
    }
    text(canvas, "each row to its own scale, % of its limit", (x, y), 15.0, MUTED, FontStyle::Normal)?;
    Ok(())
}

fn draw_row(canvas: &Canvas<'_>, row: &Row, top: i32) -> Result<(), Box<dyn Error>> {
    let peer = row.peer.as_ref().map(|peer| peer.value);
    let values = [row.limit, row.ours, peer, row.must, row.aim];
    let largest = values.into_iter().flatten().fold(f64::MIN_POSITIVE, f64::max);
    let at = |value: f64| BARS.start + (value / largest * f64::from(BARS.end - BARS.start)).round() as i32;
    let line = |index: i32| top + index * PITCH;
    let label = |index: i32, words: &str, colour: RGBColor, style: FontStyle| {
        text(canvas, words, (BARS.end + 14, line(index) + BAR / 2), 15.0, colour, style)
    };

    bar(canvas, MARGIN..WIDTH - MARGIN, top - 13..top - 12, LIMIT)?;
    text(canvas, &row.what, (MARGIN, line(0) + BAR / 2), 15.5, TEXT, FontStyle::Bold)?;
    text(canvas, &row.device, (MARGIN, line(1) + BAR / 2), 14.5, MUTED, FontStyle::Normal)?;

    match row.ours {
        Some(value) => {
            bar(canvas, BARS.start..at(value), line(0)..line(0) + BAR, OURS)?;
            let share = row.limit.map(|limit| format!(" ({:.0} %)", value / limit * 100.0));
            let words = format!("{} {}{}", number(value), row.unit, share.unwrap_or_default());
            label(0, &words, OURS, FontStyle::Bold)?;
        }
        None => label(0, "not measured yet", MUTED, FontStyle::Normal)?,
    }
    let mut next = 1;
    if let Some(peer) = &row.peer {
        bar(canvas, BARS.start..at(peer.value), line(next)..line(next) + BAR, PEER)?;
        label(next, &format!("{} {}", peer.name, number(peer.value)), TEXT, FontStyle::Normal)?;
        next += 1;
    }
    match row.limit {
        Some(limit) => {
            bar(canvas, BARS.start..at(limit), line(next)..line(next) + BAR, LIMIT)?;
            label(next, &format!("limit {}", number(limit)), MUTED, FontStyle::Normal)?;
        }
        None => label(next, "limit not known", MUTED, FontStyle::Normal)?,
    }
    for (value, is_must) in [(row.must, true), (row.aim, false)] {
        if let Some(value) = value {
            goal(canvas, at(value), line(0), is_must)?;
        }
    }
    Ok(())
}

/// A tick across a bar at what must be reached, an arrow above it at what is aimed for.
fn goal(canvas: &Canvas<'_>, x: i32, top: i32, is_must: bool) -> Result<(), Box<dyn Error>> {
    if is_must {
        return bar(canvas, x - 1..x + 2, top - 3..top + BAR + 3, GOAL);
    }
    let corners = vec![(x - 5, top - 7), (x + 6, top - 7), (x, top + 1)];
    canvas.draw(&Polygon::new(corners, GOAL))?;
    Ok(())
}

fn bar(
    canvas: &Canvas<'_>,
    x: std::ops::Range<i32>,
    y: std::ops::Range<i32>,
    colour: RGBColor,
) -> Result<(), Box<dyn Error>> {
    canvas.draw(&Rectangle::new([(x.start, y.start), (x.end, y.end)], colour.filled()))?;
    Ok(())
}

/// Text whose left end is at a place and whose middle is at its height.
fn text(
    canvas: &Canvas<'_>,
    words: &str,
    place: (i32, i32),
    size: f64,
    colour: RGBColor,
    style: FontStyle,
) -> Result<(), Box<dyn Error>> {
    let font = FontDesc::new(FontFamily::SansSerif, size, style);
    let style = TextStyle::from(font).color(&colour).pos(Pos::new(HPos::Left, VPos::Center));
    canvas.draw(&Text::new(words.to_owned(), place, style))?;
    Ok(())
}

/// Three digits at least, thousands apart.
fn number(value: f64) -> String {
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    let written = format!("{value:.digits$}");
    let (whole, fraction) = written.split_once('.').map_or((&*written, ""), |(whole, rest)| (whole, rest));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if fraction.is_empty() { grouped } else { format!("{grouped}.{fraction}") }
}

/// Exchanges colours where the reader's screen is dark.
fn with_dark_mode(svg: &str) -> String {
    let hex = |colour: RGBColor| format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2);
    let rule =
        |(light, dark): (RGBColor, RGBColor)| format!("[fill=\"{}\"]{{fill:{}}}", hex(light), hex(dark));
    let rules: String = COLOURS.into_iter().map(rule).collect();
    let style = format!("<style>@media (prefers-color-scheme:dark){{{rules}}}</style>\n");
    match svg.find(">\n") {
        Some(end) => format!("{}{style}{}", &svg[..end + 2], &svg[end + 2..]),
        None => svg.to_owned(),
    }
}
