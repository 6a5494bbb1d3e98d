use super::*;
use moesaic_types::ErrorCode;

fn bytes() -> Vocabulary {
    let mut token_bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    token_bytes.push(b"<end>".to_vec());
    token_bytes.push(b"<turn>".to_vec());
    Vocabulary { token_bytes, special: vec![], eos: vec![256, 257] }
}

/// With tokens that are long, as real vocabularies have them: a mask looks far ahead.
fn with_long_tokens() -> Arc<Compiler> {
    let mut vocabulary = bytes();
    vocabulary.token_bytes.extend((2..=64).map(|len| vec![b'a'; len]));
    Arc::new(Compiler::new(&vocabulary, &Config::default()).unwrap())
}

fn compiler(config: Config) -> Arc<Compiler> {
    Arc::new(Compiler::new(&bytes(), &config).unwrap())
}

fn allowed(state: &mut State) -> Vec<TokenId> {
    let mask = state.mask().unwrap();
    (0..258).filter(|&id| mask[id as usize / 32] >> (id % 32) & 1 == 1).collect()
}

#[test]
fn a_regex_allows_what_matches_and_ends() {
    let compiler = compiler(Config::default());
    let mut state = compiler.compile(&Grammar::Regex("a(b|c)?/".into()), &[]).unwrap();
    assert_eq!(allowed(&mut state), [97]);
    state.advance(97).unwrap();
    assert_eq!(allowed(&mut state), [47, 98, 99]);
    state.advance(99).unwrap();
    assert!(!state.is_complete());
    state.advance(47).unwrap();
    assert!(state.is_complete());
    let mut resumed = compiler.compile(&Grammar::Regex("ab*".into()), &[97, 98]).unwrap();
    assert_eq!(allowed(&mut resumed), [98, 256, 257]);
    resumed.advance(257).unwrap();
    assert!(resumed.is_complete());
}

#[test]
fn bad_grammars_are_refused_with_their_field() {
    let compiler = compiler(Config { max_grammar_bytes: 50, ..Config::default() });
    let long: Arc<str> = "a".repeat(51).into();
    let cases = [
        (Grammar::JsonSchema("{".into()), "response_format"),
        (Grammar::JsonSchema("{\"type\": \"unknown\"}".into()), "response_format"),
        (Grammar::Regex("(".into()), "regex"),
        (Grammar::Regex(long), "regex"),
        (Grammar::Lark("start: missing".into()), "grammar"),
    ];
    for (grammar, field) in cases {
        let error = compiler.compile(&grammar, &[]).err().unwrap_or_else(|| panic!("{grammar:?} compiled"));
        assert_eq!((error.code, error.field.as_deref()), (ErrorCode::InvalidArgument, Some(field)), "{error}");
    }
    assert!(compiler.compile(&Grammar::Regex("ab".into()), &[120]).is_err());
}

#[test]
fn a_schema_admits_its_documents_only() {
    let compiler = compiler(Config::default());
    let schema = r#"{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}"#;
    let follow = |text: &str| -> Result<()> {
        let mut state = compiler.compile(&Grammar::JsonSchema(schema.into()), &[])?;
        for byte in text.bytes() {
            let mask = state.mask()?;
            if mask[byte as usize / 32] >> (byte % 32) & 1 == 0 {
                return Err(Error::internal(format!("{byte} is not allowed")));
            }
            state.advance(byte as TokenId)?;
        }
        Ok(())
    };
    follow(r#"{"a": 12}"#).unwrap();
    assert!(follow(r#"{"a": "x"}"#).is_err());
    assert!(follow("[1]").is_err());
}

#[test]
fn a_grammar_that_no_text_can_follow_is_refused_before_it_runs() {
    let compiler = with_long_tokens();
    for (grammar, field) in [
        (Grammar::Regex(r"[^\s\S]".into()), "regex"),
        (Grammar::JsonSchema(r##"{"$ref": "#"}"##.into()), "response_format"),
        (Grammar::Regex("((a{1,200}){1,200}){1,200}b".into()), "regex"),
    ] {
        for _fresh_then_again in 0..2 {
            let error = compiler.compile(&grammar, &[]).err().unwrap_or_else(|| panic!("{grammar:?} compiled"));
            assert_eq!((error.code, error.field.as_deref()), (ErrorCode::InvalidArgument, Some(field)), "{error}");
            assert!(error.message.starts_with(field) && !error.message.contains("verbose"), "{error}");
        }
    }
}

#[test]
fn a_grammar_that_becomes_too_complex_later_names_its_field() {
    let compiler = with_long_tokens();
    let grammar = Grammar::Lark(r#"start: "x" /((a{1,200}){1,200}){1,200}b/"#.into());
    let mut state = compiler.compile(&grammar, &[]).unwrap();
    let mut follow = || {
        state.mask()?;
        state.advance(TokenId::from(b'x'))?;
        state.mask()
    };
    let error = follow().expect_err("the second part is beyond the lexer's limits");
    assert_eq!((error.code, error.field.as_deref()), (ErrorCode::InvalidArgument, Some("grammar")), "{error}");
}

#[test]
fn white_space_in_json_is_bounded_and_a_complete_value_ends_it() {
    let compiler = compiler(Config::default());
    let schema = |x: &str| {
        let text =
            r#"{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"],"additionalProperties":false"#;
        Grammar::JsonSchema(format!("{text}{x}}}").into())
    };
    let free = schema("");
    let none = schema(r#","x-guidance":{"whitespace_flexible":false}"#);
    for text in ["{\"a\":1}", "{ \"a\": 1 }", "{\n    \"a\": 1\n}", "{\r\n\t\"a\" : 1\r\n}"] {
        assert!(follows(&compiler, &free, text), "{text:?}");
        assert_eq!(follows(&compiler, &none, text), !text.contains([' ', '\n', '\t']), "{text:?}");
    }
    for text in ["{  \"a\":1}", "{\n\n\"a\":1}", "{\"a\":1 \n}", "{\"a\":1}\n", "{\"a\":1} "] {
        assert!(!follows(&compiler, &free, text), "{text:?}");
    }
    let mut state = compiler.compile(&free, &[]).unwrap();
    let text = "{\"a\": 12}";
    for (at, byte) in text.bytes().enumerate() {
        assert!(!state.is_complete(), "before byte {at}");
        state.mask().unwrap();
        state.advance(TokenId::from(byte)).unwrap();
    }
    assert!(state.is_complete(), "with its last bracket");
    let ids: Vec<_> = text.bytes().map(TokenId::from).collect();
    assert!(compiler.compile(&free, &ids).unwrap().is_complete(), "elsewhere, too");
    // of a number nobody knows whether it goes on
    let mut number = compiler.compile(&Grammar::JsonSchema(r#"{"type":"integer"}"#.into()), &[]).unwrap();
    number.mask().unwrap();
    number.advance(TokenId::from(b'1')).unwrap();
    assert!(!number.is_complete() && allowed(&mut number).contains(&256));
    assert!(follows(&compiler, &Grammar::JsonSchema("true".into()), "[1, {}]"));
}

/// Whether a text follows a grammar to its end.
fn follows(compiler: &Compiler, grammar: &Grammar, text: &str) -> bool {
    let mut state = compiler.compile(grammar, &[]).unwrap();
    for id in text.bytes().map(TokenId::from) {
        if state.is_complete() || !allowed(&mut state).contains(&id) {
            return false;
        }
        state.advance(id).unwrap();
    }
    state.is_complete() || allowed(&mut state).contains(&256)
}

#[test]
fn the_mode_for_any_json_object_admits_objects_only() {
    let compiler = compiler(Config::default());
    let nested = r#"{"a": {"b": [1, 2.5e-3, null, true, "x\\n\\u00e9"]}, "": ""}"#;
    for text in ["{}", "{ \"a\" : 1 }", nested] {
        assert!(serde_json::from_str::<serde_json::Value>(text).unwrap().is_object());
        assert!(follows(&compiler, &Grammar::JsonObject, text), "{text}");
    }
    for text in ["", "[]", "1", "null", "\"a\"", "{", "{\"a\"}", "{\"a\": 1,}", "{a: 1}", "{'a': 1}", "{} {}", "{}x"] {
        assert!(!follows(&compiler, &Grammar::JsonObject, text), "{text}");
    }
}

#[test]
fn what_was_compiled_is_kept_by_content_and_the_oldest_goes() {
    let compiler = compiler(Config { grammar_cache: 2, ..Config::default() });
    let regex = |text: &str| Grammar::Regex(text.into());
    let compile = |grammar: Grammar| {
        let mut state = compiler.compile(&grammar, &[]).unwrap();
        (allowed(&mut state), compiler.compiled())
    };
    assert_eq!(compile(regex("ab")), (vec![97], 1));
    assert_eq!(compile(Grammar::Lark("start: /ab/".into())).1, 2, "another kind");
    let mut going_on = compiler.compile(&regex("ab"), &[]).unwrap();
    going_on.advance(97).unwrap();
    assert_eq!(compile(regex("ab")), (vec![97], 2), "fresh, whatever others did with it");
    assert_eq!(allowed(&mut going_on), [98]);
    assert_eq!(compile(regex("c")), (vec![99], 3));
    assert_eq!(compile(regex("ab")).1, 3, "used later than the other");
    assert_eq!(compile(Grammar::Lark("start: /ab/".into())).1, 4);
    let mut resumed = compiler.compile(&regex("ab"), &[97]).unwrap();
    assert_eq!(allowed(&mut resumed), [98]);
    assert!(compiler.compile(&regex("("), &[]).is_err() && compiler.compile(&regex("("), &[]).is_err());
}

fn large_schema() -> Grammar {
    let words: Vec<String> = (0..5000u64).map(|n| format!("{:x}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
    Grammar::JsonSchema(serde_json::json!({ "enum": words }).to_string().into())
}

#[tokio::test(flavor = "current_thread")]
async fn compiling_leaves_the_runtimes_thread_alone_and_ends_in_time() {
    let limits = Config { grammar_timeout_ms: 1, max_grammar_bytes: 1 << 20, grammar_workers: 1, ..Config::default() };
    let compiler = compiler(limits);
    let mut compiling = Box::pin(compiler.compile_aside(large_schema(), Vec::new()));
    assert!(futures::poll!(&mut compiling).is_pending(), "compiled on the runtime's thread");
    let error = compiling.await.err().unwrap();
    assert_eq!((error.code, error.field.as_deref()), (ErrorCode::InvalidArgument, Some("response_format")));
    assert!(error.message.contains("1 ms"), "{error}");
    let error = compiler.compile_aside(Grammar::Regex("a".into()), Vec::new()).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");
    // The compilation goes on to its end.
    while compiler.workers.available_permits() == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(compiler.compiled(), 1);
    compiler.compile(&large_schema(), &[]).unwrap();
    assert_eq!(compiler.compiled(), 1, "found in the cache");
}

#[tokio::test(flavor = "current_thread")]
async fn a_schema_that_is_too_large_is_an_error_that_names_the_field() {
    let properties: Vec<String> = (0..30_000).map(|n| format!(r#""p{n}":{{"const":{n}}}"#)).collect();
    let schema = format!(r#"{{"type":"object","properties":{{{}}}}}"#, properties.join(","));
    let limits = Config { grammar_timeout_ms: 60_000, max_grammar_bytes: 1 << 20, ..Config::default() };
    let compiler = compiler(limits);
    let error = compiler.compile_aside(Grammar::JsonSchema(schema.into()), Vec::new()).await.err().unwrap();
    assert_eq!((error.code, error.field.as_deref()), (ErrorCode::InvalidArgument, Some("response_format")), "{error}");
    compiler.compile_aside(Grammar::JsonObject, Vec::new()).await.unwrap();
}
