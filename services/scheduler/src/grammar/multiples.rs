//! Bounds `multipleOf`: an automaton for the multiples of a number has as many states as that number, and the
//! compiler builds them without asking how much has been spent.
use serde_json::Value;

/// The largest coefficient, and the largest least common multiple where several hold at once.
const LARGEST: u64 = 10_000;

/// Checks a schema.
///
/// # Errors
/// What is too large, for the message.
pub fn check(schema: &Value) -> Result<(), String> {
    held_at_once(schema).map(drop)
}

/// The least common multiple of what holds for one value of `schema`.
fn held_at_once(schema: &Value) -> Result<u64, String> {
    let mut multiple = 1;
    match schema {
        Value::Array(items) => items.iter().try_for_each(check)?,
        Value::Object(keys) => {
            for (key, value) in keys {
                match (key.as_str(), value) {
                    ("multipleOf", Value::Number(number)) => {
                        multiple = join(multiple, coefficient(&number.to_string())?)?
                    }
                    ("allOf", Value::Array(all)) => {
                        for part in all {
                            multiple = join(multiple, held_at_once(part)?)?;
                        }
                    }
                    // one of these holds beside the rest
                    ("anyOf" | "oneOf", Value::Array(any)) => {
                        let mut largest = 1;
                        for part in any {
                            largest = largest.max(join(multiple, held_at_once(part)?)?);
                        }
                        multiple = largest;
                    }
                    ("enum" | "const" | "default" | "examples", _) => {}
                    _ => check(value)?,
                }
            }
        }
        _ => {}
    }
    Ok(multiple)
}

/// A number without its point and its zeroes: what the automaton counts.
fn coefficient(number: &str) -> Result<u64, String> {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "-0"));
    let digits: String = mantissa.chars().filter(char::is_ascii_digit).collect();
    let digits = digits.trim_start_matches('0');
    let digits = if mantissa.contains('.') { digits.trim_end_matches('0') } else { digits };
    let too_large = || format!("multipleOf {number} is too large; its digits must make at most {LARGEST}");
    let coefficient: u64 = if digits.is_empty() { Ok(1) } else { digits.parse() }.map_err(|_| too_large())?;
    let is_small = coefficient <= LARGEST && exponent.starts_with('-');
    if is_small { Ok(coefficient) } else { Err(too_large()) }
}

fn join(a: u64, b: u64) -> Result<u64, String> {
    let divisor = (1..=b).rev().find(|divisor| a.is_multiple_of(*divisor) && b.is_multiple_of(*divisor)).unwrap_or(1);
    let multiple = a / divisor * b;
    if multiple <= LARGEST {
        return Ok(multiple);
    }
    Err(format!("several multipleOf hold at once, whose least common multiple is {multiple}; at most {LARGEST} can be"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_would_take_too_many_states_is_refused() {
        let fine = [
            json!({"multipleOf": 10_000}),
            json!({"multipleOf": 0.01}),
            json!({"properties": {"a": {"multipleOf": 997}, "b": {"multipleOf": 991}}}),
            json!({"multipleOf": 6, "allOf": [{"multipleOf": 4}, {"multipleOf": 10}]}),
            json!({"const": {"multipleOf": 99_999_989}}),
            json!(true),
        ];
        for schema in fine {
            assert_eq!(check(&schema), Ok(()), "{schema}");
        }
        let primes: Vec<_> = [7, 11, 13, 17, 19, 23].iter().map(|n| json!({"multipleOf": n})).collect();
        let large = [
            json!({"type": "integer", "multipleOf": 99_999_989}),
            json!({"multipleOf": 0.123_457}),
            json!({"items": {"multipleOf": 10_007}}),
            json!({"allOf": primes}),
            json!({"multipleOf": 997, "allOf": [{"multipleOf": 991}]}),
            json!({"multipleOf": 997, "anyOf": [{"multipleOf": 991}, {}]}),
            json!({"multipleOf": 1e30}),
        ];
        for schema in large {
            assert!(check(&schema).is_err_and(|reason| reason.contains("multipleOf")), "{schema}");
        }
    }
}
