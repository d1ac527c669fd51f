//! What all requests share: the host, the metrics, and the way to call the library from async code.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use axum::http::{HeaderMap, StatusCode};
use deltabox::{Error, Host, Sandbox};
use tokio::sync::{Notify, mpsc};

use crate::api::{EPOCH_HEADER, ServiceInfo};
use crate::expected::Expected;
use crate::failure::{Answer, Failure};
use crate::metrics::Metrics;

/// The state of the service; clones share it.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) host: Arc<Host>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) info: Arc<ServiceInfo>,
    pub(crate) stop: Arc<Stop>,
    pub(crate) expected: Expected,
    /// Held by every attached stream, so that a shutdown can wait for their last frames.
    pub(crate) attached: mpsc::Sender<()>,
}

impl App {
    pub(crate) fn new(host: Arc<Host>, info: ServiceInfo, attached: mpsc::Sender<()>) -> Self {
        Self {
            host,
            metrics: Arc::default(),
            info: Arc::new(info),
            stop: Arc::default(),
            expected: Expected::default(),
            attached,
        }
    }

    /// Runs a call of the library on a thread that may block, and counts it as `operation`.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Host) -> deltabox::Result<T> + Send + 'static,
    ) -> Answer<T> {
        let (host, metrics) = (self.host.clone(), self.metrics.clone());
        let done = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            let result = work(&host);
            metrics.operation(operation, begun.elapsed(), result.is_ok());
            result
        });
        match done.await {
            Ok(result) => result.map_err(Failure::from),
            Err(_) => Err(Failure::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "bug",
                format!("the service failed in {operation} (a bug); its log says where"),
            )),
        }
    }

    /// The same for a question about one sandbox, which is answered without waking it up if it is on disk only; refused when
    /// the epoch that `headers` name is over.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        operation: &'static str,
        name: String,
        headers: &HeaderMap,
        question: impl FnOnce(&Host, &str) -> deltabox::Result<T> + Send + 'static,
    ) -> Answer<T> {
        let expected = expected_epoch(headers)?;
        self.call(operation, move |host| {
            check_epoch_of(host, &name, expected)?;
            question(host, &name)
        })
        .await
    }

    /// The same for a call that concerns one sandbox, refused when the epoch that `headers` name is over.
    pub(crate) async fn call_on<T: Send + 'static>(
        &self,
        operation: &'static str,
        name: String,
        headers: &HeaderMap,
        work: impl FnOnce(&Sandbox) -> deltabox::Result<T> + Send + 'static,
    ) -> Answer<T> {
        self.call_found(operation, name, headers, Host::get, work)
            .await
    }

    /// The same for a call that makes sense only while the sandbox runs: one that is on disk only is not woken up for it.
    pub(crate) async fn call_on_running<T: Send + 'static>(
        &self,
        operation: &'static str,
        name: String,
        headers: &HeaderMap,
        work: impl FnOnce(&Sandbox) -> deltabox::Result<T> + Send + 'static,
    ) -> Answer<T> {
        self.call_found(operation, name, headers, Host::get_awake, work)
            .await
    }

    async fn call_found<T: Send + 'static>(
        &self,
        operation: &'static str,
        name: String,
        headers: &HeaderMap,
        find: fn(&Host, &str) -> deltabox::Result<Arc<Sandbox>>,
        work: impl FnOnce(&Sandbox) -> deltabox::Result<T> + Send + 'static,
    ) -> Answer<T> {
        let expected = expected_epoch(headers)?;
        self.call(operation, move |host| {
            let sandbox = find(host, &name)?;
            check_epoch(&sandbox, expected)?;
            work(&sandbox)
        })
        .await
    }
}

/// As [`check_epoch`], without waking up a sandbox that is on disk only.
pub(crate) fn check_epoch_of(
    host: &Host,
    name: &str,
    expected: Option<u64>,
) -> deltabox::Result<()> {
    let Some(expected) = expected else {
        return Ok(());
    };
    match host.info(name)?.epoch {
        actual if actual == expected => Ok(()),
        actual => Err(Error::Epoch { expected, actual }),
    }
}

/// Whether the service is to stop.
#[derive(Default)]
pub(crate) struct Stop {
    requested: AtomicBool,
    changed: Notify,
}

impl Stop {
    /// Asks the service to stop; requests that arrive from now on are refused.
    pub(crate) fn request(&self) {
        self.requested.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    /// Waits for [`Stop::request`].
    pub(crate) async fn requested(&self) {
        self.changed.notified().await;
    }

    pub(crate) fn refuse(&self) -> Answer<()> {
        if self.requested.load(Ordering::Acquire) {
            return Err(Failure::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "stopping",
                "the service is stopping; run the command again to start a new one",
            ));
        }
        Ok(())
    }
}

/// The epoch that a request names, if it names one.
pub(crate) fn expected_epoch(headers: &HeaderMap) -> Answer<Option<u64>> {
    let Some(value) = headers.get(EPOCH_HEADER) else {
        return Ok(None);
    };
    let number = value.to_str().ok().and_then(|text| text.parse().ok());
    number.map(Some).ok_or_else(|| {
        Failure::invalid(format!(
            "the header {EPOCH_HEADER} must be a number: {value:?}"
        ))
    })
}

/// Refuses when the sandbox was rolled back since.
pub(crate) fn check_epoch(sandbox: &Sandbox, expected: Option<u64>) -> deltabox::Result<()> {
    let actual = sandbox.epoch();
    match expected {
        Some(expected) if expected != actual => Err(Error::Epoch { expected, actual }),
        _ => Ok(()),
    }
}
