//! Values of flags.

use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::backend::{Backend, Float};

/// Parses the name of a backend.
pub fn backends() -> impl TypedValueParser<Value = Backend> {
    PossibleValuesParser::new(Backend::ALL.map(Backend::name)).try_map(|text| text.parse::<Backend>())
}

/// Parses the name of a type.
pub fn floats() -> impl TypedValueParser<Value = Float> {
    PossibleValuesParser::new(Float::ALL.map(Float::name)).try_map(|text| text.parse::<Float>())
}

/// A number of bytes: `12GiB`, `500 MB`, `4096`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let error = || format!("found {text}, needed bytes, such as 12GiB, 500MB or 4096");
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            _ => return Err(error()),
        };
        let number: f64 = number.parse().map_err(|_| error())?;
        Ok(Size((number * factor as f64) as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let size = |text: &str| text.parse().map(|Size(bytes)| bytes);
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("12GiB"), Ok(12 << 30));
        assert_eq!(size("1.5 k"), Ok(1536));
        assert_eq!(size("500MB"), Ok(500_000_000));
        for wrong in ["", "GiB", "12XB", "-1", "1..2"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
