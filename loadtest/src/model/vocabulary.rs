//! A vocabulary for models that have learned nothing: byte-level BPE over made-up words of consonants and vowels.
//!
//! Any text has tokens, every token but some bytes has text of its own, and each word is reached by its merges.
use super::gguf::Value;

const CONSONANTS: &str = "bcdfghjklmnpqrstvwxz";
const VOWELS: &str = "aeiouy";
/// What ends a text, and the marks of a conversation; the last tokens of the vocabulary.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// The byte-level form of a space.
const SPACE: char = '\u{120}';

/// Bytes, and the special tokens.
pub const LEAST: usize = 256 + SPECIAL.len();
/// Words of three syllables are the last.
pub const MOST: usize = 1 << 20;

/// `tokenizer.ggml.token_type` of ordinary tokens and of special ones.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;

const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// How GPT-2 writes each byte as a character: printable ones as they are, the others from U+0100 on.
fn byte_characters() -> Vec<char> {
    let mut next = 0x100;
    let character = |byte: u8| {
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            return char::from(byte);
        }
        next += 1;
        char::from_u32(next - 1).expect("the 68 characters from U+0100 on exist")
    };
    (0..=u8::MAX).map(character).collect()
}

/// The pairs that are merged, the earlier ones first.
fn merges() -> impl Iterator<Item = (String, String)> {
    let syllables =
        || CONSONANTS.chars().flat_map(|consonant| VOWELS.chars().map(move |vowel| format!("{consonant}{vowel}")));
    let pairs = move || syllables().flat_map(move |first| syllables().map(move |second| (first.clone(), second)));
    let spaced = |word: String| (SPACE.to_string(), word);
    let letters =
        CONSONANTS.chars().flat_map(|consonant| VOWELS.chars().map(move |vowel| (consonant.into(), vowel.into())));
    let words = pairs().map(|(first, second)| format!("{first}{second}"));
    letters
        .chain(pairs())
        // after the words that they begin: else these were never reached
        .chain(syllables().map(spaced))
        .chain(pairs().map(move |(first, second)| spaced(format!("{first}{second}"))))
        .chain(words.flat_map(move |word| syllables().map(move |last| (word.clone(), last))))
}

/// The keys of a tokenizer of `vocab` tokens, from [`LEAST`] to [`MOST`].
pub fn metadata(vocab: usize) -> Vec<(String, Value)> {
    let merges: Vec<(String, String)> = merges().take(vocab - LEAST).collect();
    let mut tokens: Vec<String> = byte_characters().into_iter().map(String::from).collect();
    tokens.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
    let mut kinds = vec![NORMAL; tokens.len()];
    tokens.extend(SPECIAL.map(str::to_owned));
    kinds.resize(tokens.len(), CONTROL);
    let id = |text: &str| {
        let at = tokens.iter().rposition(|token| token == text).expect("the special tokens are the last ones");
        Value::U32(at as u32)
    };
    let key = |name: &str, value: Value| (format!("tokenizer.{name}"), value);
    let ids = [key("ggml.eos_token_id", id("<|im_end|>")), key("ggml.padding_token_id", id("<|endoftext|>"))];
    let merges = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
    let mut all = vec![
        key("ggml.model", Value::Text("gpt2".into())),
        key("ggml.pre", Value::Text("qwen2".into())),
        key("ggml.tokens", Value::Texts(tokens)),
        key("ggml.token_type", Value::I32s(kinds)),
        key("ggml.merges", Value::Texts(merges)),
        key("ggml.add_bos_token", Value::Bool(false)),
        key("chat_template", Value::Text(TEMPLATE.into())),
    ];
    all.extend(ids);
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn bytes_have_characters_of_their_own_as_gpt_2_has_them() {
        let characters = byte_characters();
        assert_eq!(characters.iter().collect::<HashSet<_>>().len(), 256);
        assert_eq!(
            (characters[b' ' as usize], characters[b'\n' as usize], characters[b'a' as usize]),
            (SPACE, 'Ċ', 'a')
        );
    }

    #[test]
    fn there_are_as_many_tokens_as_asked_for_and_each_is_one_of_a_kind() {
        for vocab in [LEAST, 512, 8000, 32_000, 100_000] {
            let all = metadata(vocab);
            let texts = |name: &str| match all.iter().find(|(key, _)| key.ends_with(name)) {
                Some((_, Value::Texts(texts))) => texts.clone(),
                other => panic!("{name}: {other:?}"),
            };
            let tokens = texts("ggml.tokens");
            assert_eq!(tokens.len(), vocab);
            assert_eq!(tokens.iter().collect::<HashSet<_>>().len(), vocab);
            assert_eq!(texts("ggml.merges").len(), vocab - LEAST);
        }
    }

    #[test]
    fn merges_are_of_earlier_tokens() {
        let mut known: HashSet<String> = byte_characters().into_iter().map(String::from).collect();
        for (left, right) in merges().take(40_000) {
            assert!(known.contains(&left) && known.contains(&right), "{left} {right}");
            assert!(known.insert(format!("{left}{right}")));
        }
    }
}
