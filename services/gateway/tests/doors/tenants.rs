//! Whose prefix blocks are whose: the salt that a replica is given.
use crate::client;
use crate::scripted::Act;
use crate::server::{Doors, config, model};
use moesaic_config::Secret;
use moesaic_gateway::Config;
use moesaic_proto::inference::v1 as wire;
use moesaic_types::TenantSalt;
use serde_json::json;
use tonic::metadata::MetadataValue;

async fn salts(config: Config, keys: &[Option<&str>]) -> Vec<TenantSalt> {
    let doors = Doors::with(config, model(), [vec![Act::Answer]]).await;
    for key in keys {
        let bearer = key.map(|key| format!("Bearer {key}"));
        let headers: Vec<_> = bearer.iter().map(|bearer| ("authorization", bearer.as_str())).collect();
        // a client cannot choose a salt
        let body = json!({"prompt": "Count:", "max_tokens": 1, "user": "somebody", "metadata": {"salt": "x"}});
        let answer = client::send(doors.http, "POST", "/v1/completions", &headers, body.to_string().as_bytes()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    for key in keys.iter().flatten() {
        let request = wire::GenerateRequest {
            text: "Count:".into(),
            sampling: Some(wire::SamplingParams { max_tokens: Some(1), ..Default::default() }),
            ..Default::default()
        };
        let mut request = tonic::Request::new(request);
        request.metadata_mut().insert("authorization", MetadataValue::try_from(format!("Bearer {key}")).unwrap());
        let mut stream = doors.client().await.generate(request).await.unwrap().into_inner();
        while stream.message().await.unwrap().is_some() {}
    }
    doors.replicas[0].requests().iter().map(|request| request.salt).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_key_has_blocks_of_its_own_through_either_door() {
    let secret = Config { salt_secret: Secret::new("operator"), ..config() };
    let got = salts(secret.clone(), &[Some("a"), Some("b"), None, Some("a")]).await;
    let [a, b, nobody, again, grpc_a, grpc_b, _] = got[..] else { panic!("{got:?}") };
    assert_eq!((a, b), (again, grpc_b), "a key's salt is the same each time");
    assert_eq!(a, grpc_a, "and through both doors");
    assert!(a != b && a != nobody && b != nobody);
    assert_eq!(salts(secret, &[Some("a")]).await[0], a, "two gateways of one secret share blocks");
    let other = Config { salt_secret: Secret::new("another"), ..config() };
    assert_ne!(salts(other, &[Some("a")]).await[0], a, "the salt cannot be guessed from the key");
    let random = salts(config(), &[Some("a")]).await[0];
    assert_ne!(salts(config(), &[Some("a")]).await[0], random, "without a secret it is random");
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_shared_only_where_the_operator_says_so() {
    let shared = Config { share_prefixes: true, ..config() };
    let got = salts(shared, &[Some("a"), Some("b"), None]).await;
    assert!(got.iter().all(|salt| *salt == TenantSalt::default()), "{got:?}");
}
