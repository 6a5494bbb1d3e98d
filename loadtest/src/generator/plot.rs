//! A run as a picture: times by percentile, and what came over time. SVG, so that the numbers stay in it.
use super::drive::{Run, Sample};
use super::slo::{Objective, Slo, gaps};
use crate::client::Answer;
use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::time::Duration;

const SIZE: (u32, u32) = (1200, 800);
const MARGIN: u32 = 12;
/// Characters of a line of the title, and its height.
const LINE: (usize, u32) = (150, 18);
/// Points of a curve of percentiles.
const CURVE_POINTS: usize = 200;
/// Steps of what comes over time.
const STEPS: usize = 100;
/// Dots of single requests: more are not told apart.
const MOST_DOTS: usize = 2000;
const BLUE: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const RED: RGBColor = RGBColor(0xc0, 0x39, 0x2b);
const GREY: RGBColor = RGBColor(0x55, 0x55, 0x55);

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Points of one panel, and where a limit is.
struct Curve {
    title: &'static str,
    across: &'static str,
    points: Vec<(f64, f64)>,
    limit: Option<f64>,
    as_dots: bool,
}

/// Values in any order as a curve of (percentile, value).
fn percentiles(mut values: Vec<f64>) -> Vec<(f64, f64)> {
    values.sort_by(f64::total_cmp);
    let points = CURVE_POINTS.min(values.len().saturating_sub(1)).max(1);
    let at = |point: usize| {
        let share = point as f64 / points as f64;
        (share * 100.0, crate::stats::percentile(&values, share))
    };
    if values.is_empty() { Vec::new() } else { (0..=points).map(at).collect() }
}

/// Tokens a second in each step of the run.
fn tokens_over_time(run: &Run, answers: &[(&Sample, &Answer)]) -> Vec<(f64, f64)> {
    let seconds = |at: std::time::Instant| at.saturating_duration_since(run.begun).as_secs_f64();
    let end = answers.iter().map(|(_, answer)| seconds(answer.ended)).fold(0.0, f64::max);
    if end <= 0.0 {
        return Vec::new();
    }
    let (mut counts, width) = ([0.0; STEPS], end / STEPS as f64);
    for (_, answer) in answers {
        // an event has more than one token where several came at once
        let each = answer.completion_tokens as f64 / answer.events.len().max(1) as f64;
        for event in &answer.events {
            counts[((seconds(*event) / width) as usize).min(STEPS - 1)] += each;
        }
    }
    let step =
        |(at, count): (usize, f64)| [(at as f64 * width, count / width), ((at + 1) as f64 * width, count / width)];
    counts.into_iter().enumerate().flat_map(step).collect()
}

fn curves(run: &Run, slo: &Slo) -> Vec<Curve> {
    let with_answer = |sample| -> Option<(&Sample, &Answer)> {
        let sample: &Sample = sample;
        Some((sample, sample.outcome.as_ref().ok()?))
    };
    let answers: Vec<_> = run.samples.iter().filter_map(with_answer).collect();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let limit = |of: Objective| slo.0.iter().find(|(objective, _)| *objective == of).map(|(_, limit)| ms(*limit));
    let since = |sample: &Sample, at: std::time::Instant| {
        ms(at.saturating_duration_since(run.begun).saturating_sub(sample.scheduled))
    };
    let by_percentile = |title, values: Vec<f64>, limit| Curve {
        title,
        across: "percentile",
        points: percentiles(values),
        limit,
        as_dots: false,
    };
    let first = |(sample, answer): &(&Sample, &Answer)| since(sample, answer.first());
    let every = answers.len().div_ceil(MOST_DOTS).max(1);
    let dots = answers.iter().step_by(every).map(|pair| (pair.0.scheduled.as_secs_f64(), first(pair)));
    vec![
        by_percentile("Time to first token, ms", answers.iter().map(first).collect(), limit(Objective::Ttft)),
        by_percentile(
            "Gap between tokens, ms",
            answers.iter().flat_map(|(_, answer)| gaps(answer)).map(|gap| gap * 1e3).collect(),
            limit(Objective::Itl),
        ),
        by_percentile(
            "End to end, ms",
            answers.iter().map(|(sample, answer)| since(sample, answer.ended)).collect(),
            limit(Objective::E2e),
        ),
        Curve {
            title: "Time to first token of each request, ms",
            across: "scheduled at, s",
            points: dots.collect(),
            limit: limit(Objective::Ttft),
            as_dots: true,
        },
        Curve {
            title: "Tokens generated a second",
            across: "s",
            points: tokens_over_time(run, &answers),
            limit: None,
            as_dots: false,
        },
        Curve { title: "Requests in flight", across: "s", points: in_flight(run), limit: None, as_dots: false },
    ]
}

/// Requests that were scheduled and had neither an answer nor failed, at each change, as steps.
fn in_flight(run: &Run) -> Vec<(f64, f64)> {
    let changes_of = |sample: &Sample| [(sample.scheduled.as_secs_f64(), 1.0), (sample.ended.as_secs_f64(), -1.0)];
    let mut changes: Vec<(f64, f64)> = run.samples.iter().flat_map(changes_of).collect();
    changes.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut count, every) = (0.0, changes.len().div_ceil(MOST_DOTS).max(1));
    let mut points = Vec::new();
    for (at, (time, change)) in changes.into_iter().enumerate() {
        if at % every == 0 {
            points.push((time, count));
        }
        count += change;
        if at % every == 0 {
            points.push((time, count));
        }
    }
    points
}

/// A number at an axis.
fn label(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { crate::report::number(value) }
}

/// A text in lines that are not longer than `most` characters, where its words allow.
fn lines(text: &str, most: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.chars().count() + 1 + word.chars().count() <= most => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn draw(panel: &Panel<'_>, curve: &Curve) -> Result<()> {
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let right = largest(&mut curve.points.iter().map(|point| point.0)).max(1e-3);
    let top = largest(&mut curve.points.iter().map(|point| point.1));
    // a limit far above what was measured would press the curve to the floor
    let limit = curve.limit.filter(|limit| *limit < top * 3.0 || curve.points.is_empty());
    let top = top.max(limit.unwrap_or(0.0)).max(1e-3) * 1.05;
    let failed = |error: &dyn std::fmt::Display| anyhow!("draw the plot: {error}");
    let mut chart = ChartBuilder::on(panel)
        .caption(curve.title, ("sans-serif", 17).into_font().color(&BLACK))
        .margin(MARGIN)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..right, 0.0..top)
        .map_err(|error| failed(&error))?;
    chart
        .configure_mesh()
        .x_desc(curve.across)
        .label_style(("sans-serif", 13).into_font().color(&GREY))
        .axis_desc_style(("sans-serif", 13).into_font().color(&GREY))
        .light_line_style(TRANSPARENT)
        .bold_line_style(GREY.mix(0.18))
        .x_label_formatter(&|value| label(*value))
        .y_label_formatter(&|value| label(*value))
        .draw()
        .map_err(|error| failed(&error))?;
    let points = curve.points.iter().copied();
    let drawn = match curve.as_dots {
        true => chart.draw_series(points.map(|point| Circle::new(point, 2, BLUE.mix(0.6).filled()))).map(|_| ()),
        false => chart.draw_series(LineSeries::new(points, BLUE.stroke_width(2))).map(|_| ()),
    };
    drawn.map_err(|error| failed(&error))?;
    if let Some(limit) = limit {
        let line = LineSeries::new([(0.0, limit), (right, limit)], RED.stroke_width(1));
        chart.draw_series(line).map_err(|error| failed(&error))?;
    }
    Ok(())
}

/// All of a run's answers, warm-up included; red lines are the objectives.
///
/// # Errors
/// When it cannot be drawn.
pub fn svg(run: &Run, slo: &Slo, title: &str) -> Result<String> {
    let mut text = String::new();
    {
        let failed = |error: &dyn std::fmt::Display| anyhow!("draw the plot: {error}");
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(|error| failed(&error))?;
        let style = ("sans-serif", 14).into_font().color(&BLACK);
        let lines = lines(title, LINE.0);
        for (at, line) in (0..).zip(&lines) {
            let place = (MARGIN as i32, (MARGIN + at * LINE.1) as i32);
            root.draw_text(line, &style, place).map_err(|error| failed(&error))?;
        }
        let (_, below) = root.split_vertically(MARGIN + lines.len() as u32 * LINE.1);
        for (panel, curve) in below.split_evenly((2, 3)).iter().zip(curves(run, slo)) {
            draw(panel, &curve)?;
        }
        root.present().map_err(|error| failed(&error))?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use std::time::Instant;

    fn run(count: u64) -> Run {
        let begun = Instant::now();
        let sample = |n: u64| {
            let at = |ms: u64| begun + Duration::from_millis(n * 100 + ms);
            let events: Vec<Instant> = [40, 50, 70].map(at).to_vec();
            let answer = Answer {
                sent: at(0),
                ended: events[2],
                events,
                prompt_tokens: 9,
                cached_tokens: 0,
                completion_tokens: 3,
                told_usage: true,
            };
            let scheduled = Duration::from_millis(n * 100);
            let index = n as usize;
            let (sent, ended) = (scheduled, scheduled + Duration::from_millis(70));
            Sample { index, scheduled, sent, ended, prompt_tokens: 9, answer_tokens: 3, outcome: Ok(answer) }
        };
        Run { begun, samples: (0..count).map(sample).collect() }
    }

    #[test]
    fn it_is_an_image_with_the_data_in_it() {
        let slo: Slo = "ttft=60ms,itl=15ms".parse().unwrap();
        let text = svg(&run(30), &slo, "30 requests <&> more").unwrap();
        let document = roxmltree::Document::parse(&text).unwrap();
        let root = document.root_element();
        assert_eq!(root.tag_name().name(), "svg");
        let texts: Vec<String> = root.descendants().filter_map(|node| node.text()).map(|t| t.trim().into()).collect();
        for wanted in ["30 requests <&> more", "Time to first token, ms", "Gap between tokens, ms", "percentile"] {
            assert!(texts.iter().any(|text| text == wanted), "{wanted}: {texts:?}");
        }
        let count = |tag: &str| root.descendants().filter(|node| node.tag_name().name() == tag).count();
        assert_eq!(count("circle"), 30, "a dot for each request");
        let curves: Vec<usize> = root
            .descendants()
            .filter(|node| node.attribute("stroke") == Some("#1F6FB4"))
            .filter_map(|node| node.attribute("points"))
            .map(|points| points.split_whitespace().count())
            .collect();
        assert_eq!(curves.len(), 5, "{curves:?}");
        // percentiles of 30, 60 and 30 values
        assert_eq!(curves[..3], [30, 60, 30]);
    }

    #[test]
    fn curves_have_the_run_s_numbers() {
        let run = run(10);
        let curves = curves(&run, &"e2e=1s".parse().unwrap());
        let close = |a: f64, b: f64| (a - b).abs() < 1e-6;
        assert!(curves[0].points.iter().all(|(_, ms)| close(*ms, 40.0)) && close(curves[0].points[9].0, 100.0));
        assert!(close(curves[1].points[0].1, 10.0) && close(curves[1].points.last().unwrap().1, 20.0));
        assert_eq!(curves[2].limit, Some(1000.0));
        let tokens: f64 = curves[4].points.chunks(2).map(|step| (step[1].0 - step[0].0) * step[0].1).sum();
        assert!(close(tokens, 30.0), "the area under the rate is all tokens: {tokens}");
        let most = curves[5].points.iter().map(|point| point.1).fold(0.0, f64::max);
        assert!(close(most, 1.0) && close(curves[5].points.last().unwrap().1, 0.0));
    }

    #[test]
    fn what_failed_is_in_flight_until_then() {
        let mut run = run(2);
        run.samples[0].outcome = Err(crate::client::Failure::Empty);
        run.samples[0].ended = Duration::from_millis(150);
        let most = in_flight(&run).iter().map(|point| point.1).fold(0.0, f64::max);
        assert!((most - 2.0).abs() < 1e-9, "the second is sent at 100 ms: {most}");
    }

    #[test]
    fn a_long_title_has_several_lines() {
        assert_eq!(lines("aa bb cc dddddddd e", 5), ["aa bb", "cc", "dddddddd", "e"]);
        assert_eq!(lines("", 5), [""]);
        assert_eq!((label(10.0), label(2.5), label(1200.0)), ("10".into(), "2.50".into(), "1200".into()));
    }

    #[test]
    fn a_run_without_answers_is_drawn_too() {
        let empty = Run { begun: Instant::now(), samples: Vec::new() };
        let text = svg(&empty, &Slo::default(), "nothing").unwrap();
        assert!(roxmltree::Document::parse(&text).is_ok());
    }
}
