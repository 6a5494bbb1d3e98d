//! Shards as the placement sees them: what they hold, and what they are told to.
use super::plan::Load;
use moesaic_proto::expert::v1 as wire;
use moesaic_proto::expert::v1::expert_service_client::ExpertServiceClient;
use moesaic_transport::channel::{MAX_MESSAGE, channel};
use moesaic_types::cluster::{Member, Shares};
use moesaic_types::{Error, Result};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Response, Status};

/// What a shard says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The placement that it follows; 0 before the first.
    pub epoch: u64,
    /// What it holds.
    pub held: Shares,
    /// The load of all experts.
    pub load: Load,
}

impl From<wire::DescribeResponse> for Report {
    fn from(response: wire::DescribeResponse) -> Self {
        let (mut held, mut load) = (Shares::new(), Load::new());
        for mut layer in response.layers {
            layer.experts.sort_unstable();
            held.insert(layer.layer as usize, layer.experts);
            load.insert(layer.layer as usize, layer.load);
        }
        Self { epoch: response.epoch, held, load }
    }
}

/// A shard in another process; cheap to clone.
#[derive(Clone, Debug)]
pub struct Shard {
    peer: Arc<str>,
    client: ExpertServiceClient<Channel>,
}

impl Shard {
    /// A member.
    ///
    /// # Errors
    /// `InvalidArgument` when its address cannot be used.
    pub fn of(member: &Member) -> Result<Self> {
        let client = ExpertServiceClient::new(channel(member)?);
        let client = client.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
        Ok(Self { peer: format!("shard {}", member.id).into(), client })
    }

    /// What it holds; ends the window of its load where that is asked for.
    pub async fn describe(&self, end_window: bool, patience: Duration) -> Result<Report> {
        let mut client = self.client.clone();
        self.within(patience, client.describe(wire::DescribeRequest { end_window })).await.map(Report::from)
    }

    /// Has it load what a placement wants of it; returns when that is there.
    pub async fn prepare(&self, epoch: u64, shares: &Shares, patience: Duration) -> Result<()> {
        let request = wire::PrepareRequest { epoch, shares: moesaic_proto::shares_to_wire(shares) };
        let mut client = self.client.clone();
        self.within(patience, client.prepare(request)).await.map(|_| ())
    }

    /// Has it switch to a prepared placement.
    pub async fn commit(&self, epoch: u64, patience: Duration) -> Result<()> {
        let mut client = self.client.clone();
        let epoch_now = self.within(patience, client.commit(wire::CommitRequest { epoch })).await?.epoch;
        if epoch_now < epoch {
            return Err(Error::unavailable(format!("{} stays at epoch {epoch_now}, not {epoch}", self.peer)));
        }
        Ok(())
    }

    async fn within<T>(
        &self,
        patience: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T> {
        let late = |_| Error::unavailable(format!("{} did not answer within {patience:?}", self.peer));
        let explain = |status: Status| {
            let error = moesaic_proto::from_status(&status);
            Error { message: format!("{}: {}", self.peer, error.message), ..error }
        };
        timeout(patience, call).await.map_err(late)?.map(Response::into_inner).map_err(explain)
    }
}
