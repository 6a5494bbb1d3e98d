//! What chat templates expect of Python: `json.dumps` and `strftime`.
use minijinja::value::{Kwargs, Value as JinjaValue};
use minijinja::{Error, ErrorKind};
use serde_json::Value;
use std::time::{SystemTime, UNIX_EPOCH};

/// The `tojson` filter as Hugging Face defines it: `json.dumps(value, ensure_ascii=False, indent=..., sort_keys=...)`.
/// (Jinja's own escapes HTML, which models were not trained on.)
pub fn tojson(value: JinjaValue, indent: Option<JinjaValue>, options: Kwargs) -> Result<String, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<JinjaValue>>("indent")?,
    };
    let indent = match indent.filter(|indent| !indent.is_none() && !indent.is_undefined()) {
        Some(indent) => Some(usize::try_from(indent)?.min(16)),
        None => None,
    };
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two texts")),
    };
    let json = serde_json::to_value(&value)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("tojson: value is no JSON: {e}")))?;
    let mut writer = Writer { out: String::new(), indent, ascii, sorted, item, key };
    writer.value(&json, 1);
    Ok(writer.out)
}

struct Writer<'a> {
    out: String,
    indent: Option<usize>,
    ascii: bool,
    sorted: bool,
    item: &'a str,
    key: &'a str,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) {
        match value {
            Value::Array(list) => self.list(('[', ']'), list.iter().map(|v| (None, v)).collect(), depth),
            Value::Object(map) => {
                let mut entries: Vec<_> = map.iter().map(|(k, v)| (Some(k.as_str()), v)).collect();
                if self.sorted {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.list(('{', '}'), entries, depth);
            }
            Value::String(text) => self.text(text),
            other => self.out.push_str(&other.to_string()),
        }
    }

    fn list(&mut self, (open, close): (char, char), entries: Vec<(Option<&str>, &Value)>, depth: usize) {
        self.out.push(open);
        let empty = entries.is_empty();
        for (i, (key, value)) in entries.into_iter().enumerate() {
            if i > 0 {
                self.out.push_str(self.item);
            }
            self.line(depth);
            if let Some(key) = key {
                self.text(key);
                self.out.push_str(self.key);
            }
            self.value(value, depth + 1);
        }
        if !empty {
            self.line(depth - 1);
        }
        self.out.push(close);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn text(&mut self, text: &str) {
        let quoted = Value::String(text.to_owned()).to_string();
        if !self.ascii {
            self.out.push_str(&quoted);
            return;
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                self.out.push(c);
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    self.out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// The `strftime_now` function: the time now (UTC) in a format of Python's `strftime`.
pub fn strftime_now(format: String) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    strftime(&format, seconds)
}

/// Formats seconds since 1970 (UTC); codes that are not known stay as they are.
fn strftime(format: &str, seconds: u64) -> String {
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let year_start = (1970..year).map(|year| 365 + u64::from(is_leap(year))).sum::<u64>();
    let (hour, month_name, day_name) = (time / 3600, MONTHS[month - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let (code, padded) = match chars.next() {
            Some('-') => (chars.next(), false),
            code => (code, true),
        };
        let number = |value: u64, width: usize| {
            if padded { format!("{value:0width$}") } else { value.to_string() }
        };
        out.push_str(&match code {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month as u64, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(days - year_start + 1, 3),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('M') => number(time / 60 % 60, 2),
            Some('S') => number(time % 60, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('A') => day_name.into(),
            Some('a') => day_name[..3].into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{:02}:{:02}", time / 60 % 60, time % 60),
            Some('Z') => "UTC".into(),
            Some('z') => "+0000".into(),
            Some('%') => "%".into(),
            Some(other) => format!("%{other}"),
            None => "%".into(),
        });
    }
    out
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// Year, month (1..=12) and day (1..=31) of a day since 1970.
fn civil(mut days: u64) -> (u64, usize, u64) {
    let mut year = 1970;
    loop {
        let length = 365 + u64::from(is_leap(year));
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    for (month, length) in lengths.into_iter().enumerate() {
        if days < length {
            return (year, month + 1, days + 1);
        }
        days -= length;
    }
    unreachable!("the months' lengths add up to the year's")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // date -u -d @1709210096: Thu 29 Feb 2024 12:34:56
        let format = "%a %A %d %-d %b %B %Y %y %m %-m %H:%M:%S %I %p %j %F %T %% %Q";
        let expected = "Thu Thursday 29 29 Feb February 2024 24 02 2 12:34:56 12 PM 060 2024-02-29 12:34:56 % %Q";
        assert_eq!(strftime(format, 1_709_210_096), expected);
        assert_eq!(strftime("%d %b %Y %A", 0), "01 Jan 1970 Thursday");
        assert_eq!(strftime("%F %A", 4_107_542_399), "2100-02-28 Sunday");
        assert_eq!(strftime("%F", 4_107_542_400), "2100-03-01");
    }
}
