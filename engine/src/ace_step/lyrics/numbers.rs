//! English words for numbers, as Python's num2words 0.5.14 writes them: "one thousand, two hundred and one".
//!
//! Where that package raises an exception, these functions return `None`.

/// Zero to nineteen.
const SMALL: [&str; 20] = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
];
/// Twenty to ninety.
const TENS: [&str; 8] = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
/// Million to nonillion, without "illion".
const ILLIONS: [&str; 9] = ["m", "b", "tr", "quadr", "quint", "sext", "sept", "oct", "non"];
/// Units and tens of the Latin numerals of decillion and what is beyond, as in "quattuor-vigint-illion".
const LATIN_UNITS: [&str; 10] = ["", "un", "duo", "tre", "quattuor", "quin", "sex", "sept", "octo", "novem"];
const LATIN_TENS: [&str; 9] = [
    "dec",
    "vigint",
    "trigint",
    "quadragint",
    "quinquagint",
    "sexagint",
    "septuagint",
    "octogint",
    "nonagint",
];

/// Ordinals that are more than a "th" at the end of the cardinal.
const ORDINALS: [(&str, &str); 7] = [
    ("one", "first"),
    ("two", "second"),
    ("three", "third"),
    ("five", "fifth"),
    ("eight", "eighth"),
    ("nine", "ninth"),
    ("twelve", "twelfth"),
];

/// A currency that has words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Currency {
    /// £
    Pound,
    /// $
    Dollar,
    /// €
    Euro,
}

impl Currency {
    /// Singular and plural of the unit and of its hundredth.
    fn forms(self) -> [[&'static str; 2]; 2] {
        match self {
            Currency::Pound => [["pound sterling", "pounds sterling"], ["penny", "pence"]],
            Currency::Dollar => [["dollar", "dollars"], ["cent", "cents"]],
            Currency::Euro => [["euro", "euro"], ["cent", "cents"]],
        }
    }
}

/// "million" for 2, "centillion" for 101, at most; 1 is "thousand".
fn scale(power_of_thousand: usize) -> Option<String> {
    let numeral = match power_of_thousand {
        1 => return Some("thousand".into()),
        2..=10 => ILLIONS[power_of_thousand - 2].into(),
        11..=100 => {
            let latin = power_of_thousand - 1;
            format!("{}{}", LATIN_UNITS[latin % 10], LATIN_TENS[latin / 10 - 1])
        }
        101 => "cent".into(),
        _ => return None,
    };
    Some(numeral + "illion")
}

/// 1 to 99.
fn below_hundred(number: usize) -> String {
    match (number / 10, number % 10) {
        (0 | 1, _) => SMALL[number].into(),
        (tens, 0) => TENS[tens - 2].into(),
        (tens, ones) => format!("{}-{}", TENS[tens - 2], SMALL[ones]),
    }
}

/// 1 to 999.
fn below_thousand(number: usize) -> String {
    match (number / 100, number % 100) {
        (0, rest) => below_hundred(rest),
        (hundreds, 0) => format!("{} hundred", SMALL[hundreds]),
        (hundreds, rest) => format!("{} hundred and {}", SMALL[hundreds], below_hundred(rest)),
    }
}

/// A whole number in decimal digits, below 10^306.
pub fn cardinal(digits: &str) -> Option<String> {
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        return Some(SMALL[0].into());
    }
    let groups = digits.as_bytes().rchunks(3).enumerate();
    let mut words = Vec::new();
    let mut last = 0;
    for (power, group) in groups {
        let number = std::str::from_utf8(group).ok()?.parse().ok()?;
        match (number, power) {
            (0, _) => {}
            (_, 0) => {
                last = number;
                words.push(below_thousand(number));
            }
            _ => words.push(format!("{} {}", below_thousand(number), scale(power)?)),
        }
    }
    words.reverse();
    // What is below a hundred is added with "and", everything else after a comma.
    let ends_small = (1..100).contains(&last);
    Some(match words.split_last() {
        Some((small, before)) if ends_small && !before.is_empty() => {
            format!("{} and {small}", before.join(", "))
        }
        _ => words.join(", "),
    })
}

/// The place in an order: "twenty-first".
pub fn ordinal(digits: &str) -> Option<String> {
    let words = cardinal(digits)?;
    let start = words.rfind([' ', '-']).map_or(0, |at| at + 1);
    let (before, last) = words.split_at(start);
    Some(match (ORDINALS.iter().find(|(cardinal, _)| *cardinal == last), last.strip_suffix('y')) {
        (Some((_, ordinal)), _) => format!("{before}{ordinal}"),
        (None, Some(stem)) => format!("{before}{stem}ieth"),
        (None, None) => format!("{before}{last}th"),
    })
}

/// A number that may have decimals: "twenty point five", and "twenty" for 20.0. The decimals are those of the shortest text
/// that means the same f64, computed as the package does; a whole number is exact, where the package's division rounds from
/// 10^24 on.
pub fn decimal(number: f64) -> Option<String> {
    if !number.is_finite() || number < 0.0 {
        return None;
    }
    let whole = cardinal(&format!("{:.0}", number.trunc()))?;
    if number.fract() == 0.0 {
        return Some(whole);
    }
    let decimals = number.to_string().split_once('.').map_or(0, |(_, decimals)| decimals.len());
    // Beyond f64, where the package fails.
    let power: f64 = format!("1e{decimals}").parse().ok().filter(|power: &f64| power.is_finite())?;
    let scaled = number.fract() * power;
    // What is a whole number but for rounding is taken for it.
    let nearest = scaled.round_ties_even();
    let scaled = if (nearest - scaled).abs() < 0.01 { nearest } else { scaled.floor() };
    let digits = format!("{scaled:0>decimals$.0}");
    let digits = digits.bytes().take(decimals).map(|digit| SMALL[usize::from(digit - b'0')]);
    Some(format!("{whole} point {}", digits.collect::<Vec<_>>().join(" ")))
}

/// An amount of money: "twenty dollars, fifty cents", rounded to hundredths, halves up. `None` from 10^26 on.
pub fn currency(amount: f64, currency: Currency) -> Option<String> {
    if !(0.0..1e26).contains(&amount) {
        return None;
    }
    // Exact: an f64 near a half of a hundredth has fewer decimals than that.
    let exact = format!("{amount:.64}");
    let (units, decimals) = exact.split_once('.')?;
    let hundredths: u32 = decimals[..2].parse().ok()?;
    let hundredths = hundredths + u32::from(decimals.as_bytes()[2] >= b'5');
    // 99.995 becomes 100.00.
    let units = units.parse::<u128>().ok()? + u128::from(hundredths / 100);
    let hundredths = u128::from(hundredths % 100);
    let [unit, hundredth] = currency.forms();
    let counted = |number: u128, [one, many]: [&str; 2]| {
        let words = cardinal(&number.to_string())?;
        Some(format!("{words} {}", if number == 1 { one } else { many }))
    };
    Some(format!("{}, {}", counted(units, unit)?, counted(hundredths, hundredth)?))
}
