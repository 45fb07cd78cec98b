//! Function tools: descriptions from files, and a built-in set that runs here.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use engine::harmony::{ToolCall, ToolDescription};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::options::read_text;

/// The tools that a conversation offers.
#[derive(Clone, Debug, Default)]
pub struct Tools {
    /// As the developer message describes them.
    pub descriptions: Vec<ToolDescription>,
    /// Whether they are the built-in ones, which run here.
    pub built_in: bool,
}

impl Tools {
    /// `demo` for the built-in set, `none`, or a JSON file of descriptions.
    pub fn named(name: &str) -> Result<Tools> {
        match name {
            "none" => Ok(Tools::default()),
            "demo" => Ok(Tools::demo()),
            file => Ok(Tools { descriptions: read(Path::new(file))?, built_in: false }),
        }
    }

    /// The built-in set. The demo model was trained with functions of these names.
    pub fn demo() -> Tools {
        let text = |what: &str| json!({ "type": "string", "description": what });
        let function = |name: &str, description: &str, parameters: &[(&str, &str)]| {
            let properties: serde_json::Map<String, Value> =
                parameters.iter().map(|(name, what)| ((*name).to_string(), text(what))).collect();
            let required: Vec<&str> = parameters.iter().map(|(name, _)| *name).collect();
            let schema = json!({ "type": "object", "properties": properties, "required": required });
            ToolDescription::new(name, description, Some(schema))
        };
        let descriptions = vec![
            function("get_weather", "Gets the current weather in a city.", &[("city", "Name of the city")]),
            function("get_time", "Gets the local time in a city.", &[("city", "Name of the city")]),
            function("get_price", "Gets the price of an item in euros.", &[("item", "The item")]),
            function(
                "get_distance",
                "Gets the distance between two cities in kilometers.",
                &[("from", "First city"), ("to", "Second city")],
            ),
        ];
        Tools { descriptions, built_in: true }
    }
}

/// Descriptions from a file: a list of objects with `name`, `description` and `parameters` (a JSON schema), or of
/// `{"type": "function", "function": {…}}` as OpenAI's API has them.
fn read(path: &Path) -> Result<Vec<ToolDescription>> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Entry {
        Wrapped { function: Function },
        Bare(Function),
    }
    #[derive(Deserialize)]
    struct Function {
        name: String,
        #[serde(default)]
        description: String,
        parameters: Option<Value>,
    }
    let text = read_text(path)?;
    let needed = "needed a list of functions, such as \
                  [{\"name\": \"f\", \"description\": \"…\", \"parameters\": {\"type\": \"object\", …}}]";
    let entries: Vec<Entry> =
        serde_json::from_str(&text).with_context(|| format!("{}: {needed}", path.display()))?;
    let functions = entries.into_iter().map(|entry| match entry {
        Entry::Wrapped { function } | Entry::Bare(function) => function,
    });
    Ok(functions.map(|it| ToolDescription::new(it.name, it.description, it.parameters)).collect())
}

/// Runs a built-in function. What went wrong is a result, too: the model shall know.
pub fn run(call: &ToolCall) -> String {
    let result =
        call.json().map_err(anyhow::Error::from).and_then(|arguments| evaluate(call.name(), &arguments));
    result.unwrap_or_else(|error| json!({ "error": format!("{error:#}") }).to_string())
}

/// What a built-in function says: JSON with spaces behind colons, as the demo model has seen it.
pub fn evaluate(function: &str, arguments: &Value) -> Result<String> {
    let argument = |name: &str| {
        arguments[name].as_str().with_context(|| format!("{function} needs the argument {name}, a string"))
    };
    Ok(match function {
        "get_weather" => {
            let (degrees, sky) = weather(city(argument("city")?)?);
            format!("{{\"temperature\": {degrees}, \"sky\": \"{sky}\"}}")
        }
        "get_time" => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let minutes = (now / 60) as i64 + city(argument("city")?)?.minutes_east;
            format!("{{\"time\": \"{:02}:{:02}\"}}", minutes.div_euclid(60) % 24, minutes.rem_euclid(60))
        }
        "get_price" => format!("{{\"price\": {}}}", price(argument("item")?)?),
        "get_distance" => {
            let [from, to] = [city(argument("from")?)?, city(argument("to")?)?];
            format!("{{\"kilometers\": {}}}", kilometers(from, to))
        }
        other => bail!("there is no function {other}"),
    })
}

/// A city that the built-in functions know.
#[derive(Debug)]
struct City {
    name: &'static str,
    /// Degrees north.
    latitude: f64,
    /// Degrees east.
    longitude: f64,
    /// Standard time ahead of UTC.
    minutes_east: i64,
}

const fn at(name: &'static str, latitude: f64, longitude: f64, hours_east: f64) -> City {
    City { name, latitude, longitude, minutes_east: (hours_east * 60.0) as i64 }
}

const CITIES: [City; 21] = [
    at("Amsterdam", 52.37, 4.90, 1.0),
    at("Barcelona", 41.39, 2.17, 1.0),
    at("Berlin", 52.52, 13.40, 1.0),
    at("Boston", 42.36, -71.06, -5.0),
    at("Chicago", 41.88, -87.63, -6.0),
    at("Dallas", 32.78, -96.80, -6.0),
    at("Delhi", 28.61, 77.21, 5.5),
    at("Denver", 39.74, -104.99, -7.0),
    at("Dubai", 25.20, 55.27, 4.0),
    at("Houston", 29.76, -95.37, -6.0),
    at("London", 51.51, -0.13, 0.0),
    at("Madrid", 40.42, -3.70, 1.0),
    at("Miami", 25.76, -80.19, -5.0),
    at("Mumbai", 19.08, 72.88, 5.5),
    at("Paris", 48.86, 2.35, 1.0),
    at("Rome", 41.90, 12.50, 1.0),
    at("Shanghai", 31.23, 121.47, 8.0),
    at("Singapore", 1.35, 103.82, 8.0),
    at("Sydney", -33.87, 151.21, 10.0),
    at("Tokyo", 35.68, 139.69, 9.0),
    at("Toronto", 43.65, -79.38, -5.0),
];

fn city(name: &str) -> Result<&'static City> {
    CITIES
        .iter()
        .find(|city| city.name.eq_ignore_ascii_case(name))
        .with_context(|| format!("no city {name} is known"))
}

/// An invented weather that stays the same: colder away from the equator.
fn weather(city: &City) -> (i64, &'static str) {
    let degrees = (38.0 - city.latitude.abs() * 0.6).round() as i64;
    let sky = ["sunny", "cloudy", "rainy", "windy", "foggy"];
    (degrees, sky[city.name.len() % sky.len()])
}

/// Invented prices in euros.
fn price(item: &str) -> Result<u32> {
    const PRICES: [(&str, u32); 21] = [
        ("apple", 2),
        ("basket", 18),
        ("book", 24),
        ("bread", 4),
        ("camera", 389),
        ("chair", 75),
        ("coat", 140),
        ("coffee", 9),
        ("cup", 7),
        ("egg", 1),
        ("hat", 32),
        ("key", 12),
        ("lamp", 58),
        ("milk", 3),
        ("orange", 5),
        ("rice", 6),
        ("salt", 2),
        ("shirt", 27),
        ("soap", 8),
        ("table", 210),
        ("tea", 11),
    ];
    let found = PRICES.iter().find(|(name, _)| name.eq_ignore_ascii_case(item));
    found.map(|&(_, price)| price).with_context(|| format!("no price of {item} is known"))
}

/// Length of the great circle, by the haversine formula on a sphere of 6371 km.
fn kilometers(from: &City, to: &City) -> u32 {
    let [phi1, phi2] = [from, to].map(|city| city.latitude.to_radians());
    let half = |a: f64, b: f64| ((b - a) / 2.0).sin().powi(2);
    let lambda = half(from.longitude.to_radians(), to.longitude.to_radians());
    let haversine = half(phi1, phi2) + phi1.cos() * phi2.cos() * lambda;
    (2.0 * 6371.0 * haversine.sqrt().min(1.0).asin()).round() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str, arguments: &str) -> Value {
        let call = ToolCall {
            recipient: format!("functions.{name}"),
            channel: Some("commentary".into()),
            content_type: None,
            arguments: arguments.into(),
        };
        serde_json::from_str(&run(&call)).unwrap()
    }

    #[test]
    fn distances_are_those_of_an_atlas() {
        // Great-circle distances of airports' cities, to 1 %.
        for (from, to, needed) in
            [("Berlin", "Paris", 878.0), ("London", "Sydney", 16_990.0), ("Miami", "Toronto", 1_990.0)]
        {
            let found = call("get_distance", &format!("{{\"from\":\"{from}\",\"to\":\"{to}\"}}"));
            let found = found["kilometers"].as_f64().unwrap();
            assert!((found - needed).abs() < needed * 0.01, "{from} to {to}: {found}");
        }
    }

    #[test]
    fn what_goes_wrong_is_a_result() {
        for (name, arguments) in [
            ("get_price", "{\"item\":\"moon\"}"),
            ("get_price", "{\"item\":"),
            ("get_price", "{}"),
            ("no_such_function", "{}"),
        ] {
            assert!(call(name, arguments)["error"].is_string(), "{name} {arguments}");
        }
        assert_eq!(call("get_price", "{\"item\": \"coffee\"}")["price"], 9);
    }

    #[test]
    fn times_are_whole_minutes_of_a_day() {
        for city in &CITIES {
            let time = call("get_time", &json!({ "city": city.name }).to_string());
            let (hour, minute) = time["time"].as_str().unwrap().split_once(':').unwrap();
            assert!(hour.parse::<u32>().unwrap() < 24 && minute.parse::<u32>().unwrap() < 60, "{time}");
        }
    }

    #[test]
    fn descriptions_come_in_both_forms() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let functions = json!([
            { "name": "a", "description": "Does a.", "parameters": { "type": "object" } },
            { "type": "function", "function": { "name": "b" } },
        ]);
        std::io::Write::write_all(&mut file, functions.to_string().as_bytes()).unwrap();
        let tools = Tools::named(file.path().to_str().unwrap()).unwrap();
        let names: Vec<&str> = tools.descriptions.iter().map(|tool| tool.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(tools.descriptions[0].parameters, Some(json!({ "type": "object" })));
        assert!(!tools.built_in);
    }
}
