//! A Kubernetes cluster: deployments and stateful sets that are rolled out or scaled, and pods that start
//! and stop on this node.
//!
//! Objects are watched (list, then watch, again from where it ended; kube's watcher does that); what an
//! event is follows from how an object differs from what was seen of it before.

use std::collections::{HashMap, HashSet};

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client, Config};
use serde_json::json;

use super::Outlet;
use crate::api::types::Event;
use crate::config::Cluster;
use crate::seam::UnixNanos;

/// What matters of an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// `deployment`, `statefulset` or `pod`.
    pub what: &'static str,
    /// Its identifier in the cluster.
    pub uid: String,
    /// Changes whenever it does.
    pub version: String,
    /// `namespace/name`; of a pod, of what it belongs to, so that its successors are the same.
    pub subject: String,
    /// Pods wanted.
    pub replicas: Option<i32>,
    /// The hash of what its pods are made of.
    pub template: Option<[u8; 32]>,
    /// Whether a pod runs.
    pub running: bool,
}

fn hash(template: &PodTemplateSpec) -> Option<[u8; 32]> {
    let text = serde_json::to_vec(template).ok()?;
    Some(*blake3::hash(&text).as_bytes())
}

fn base(what: &'static str, meta: &ObjectMeta) -> Object {
    let name = meta.name.as_deref().unwrap_or_default();
    Object {
        what,
        uid: meta.uid.clone().unwrap_or_default(),
        version: meta.resource_version.clone().unwrap_or_default(),
        subject: format!("{}/{name}", meta.namespace.as_deref().unwrap_or_default()),
        replicas: None,
        template: None,
        running: false,
    }
}

impl From<Deployment> for Object {
    fn from(object: Deployment) -> Self {
        let spec = object.spec.unwrap_or_default();
        Self {
            replicas: spec.replicas,
            template: hash(&spec.template),
            ..base("deployment", &object.metadata)
        }
    }
}

impl From<StatefulSet> for Object {
    fn from(object: StatefulSet) -> Self {
        let spec = object.spec.unwrap_or_default();
        Self {
            replicas: spec.replicas,
            template: hash(&spec.template),
            ..base("statefulset", &object.metadata)
        }
    }
}

impl From<Pod> for Object {
    fn from(object: Pod) -> Self {
        let mut this = base("pod", &object.metadata);
        let owner = object.metadata.owner_references.iter().flatten().next();
        if let Some(owner) = owner {
            let labels = object.metadata.labels.unwrap_or_default();
            // The replica set of a deployment is named after it and the hash of its template.
            let hash = labels.get("pod-template-hash").map(String::as_str);
            let name = hash
                .and_then(|hash| owner.name.strip_suffix(hash)?.strip_suffix('-'))
                .unwrap_or(&owner.name);
            let namespace = object.metadata.namespace.unwrap_or_default();
            this.subject = format!("{namespace}/{name}");
        }
        let phase = object.status.and_then(|status| status.phase);
        this.running = phase.as_deref() == Some("Running");
        this
    }
}

/// The events by which `now` follows on `before`; `None` stands for an object that is not there. Pure.
pub fn events(before: Option<&Object>, now: Option<&Object>, at: UnixNanos) -> Vec<Event> {
    let Some(about) = now.or(before) else {
        return Vec::new();
    };
    let event = |did: &str, data| Event {
        id: format!("{}@{}/{did}", about.uid, about.version),
        source: "//kubernetes".to_owned(),
        kind: format!("io.kubernetes.{}.{did}", about.what),
        subject: Some(about.subject.clone()),
        time: at,
        expected_at: None,
        volumes: Vec::new(),
        data,
    };
    let mut events = Vec::new();
    if about.what == "pod" {
        let runs = |object: Option<&Object>| object.is_some_and(|o| o.running);
        match (runs(before), runs(now)) {
            (false, true) => events.push(event("started", None)),
            (true, false) => events.push(event("stopped", None)),
            _ => {}
        }
        return events;
    }
    match (before, now) {
        (None, _) => events.push(event("created", None)),
        (_, None) => events.push(event("deleted", None)),
        (Some(before), Some(now)) => {
            if before.template != now.template {
                events.push(event("rollout", None));
            }
            // Kubernetes takes one where none is said.
            let (from, to) = (before.replicas.unwrap_or(1), now.replicas.unwrap_or(1));
            if from != to {
                events.push(event("scaled", Some(json!({"from": from, "to": to}))));
            }
        }
    }
    events
}

/// What was seen of a cluster.
#[derive(Default)]
pub struct Seen {
    objects: HashMap<String, Object>,
    /// Objects that a list under way has named so far, by kind; what it does not name is gone.
    listing: HashMap<&'static str, HashSet<String>>,
    /// Kinds that have been listed before: what is there at first has not just come.
    listed: Vec<&'static str>,
}

impl Seen {
    /// Takes what a watch says of objects of the kind `what`.
    pub fn take(
        &mut self,
        what: &'static str,
        said: watcher::Event<Object>,
        at: UnixNanos,
    ) -> Vec<Event> {
        let known = self.listed.contains(&what);
        match said {
            watcher::Event::Init => {
                self.listing.insert(what, HashSet::new());
                Vec::new()
            }
            watcher::Event::InitApply(object) => {
                self.listing
                    .entry(what)
                    .or_default()
                    .insert(object.uid.clone());
                let events = self.apply(object, at);
                if known { events } else { Vec::new() }
            }
            watcher::Event::InitDone => {
                let named = self.listing.remove(what).unwrap_or_default();
                if !known {
                    self.listed.push(what);
                }
                let gone: Vec<Object> = self
                    .objects
                    .values()
                    .filter(|o| o.what == what && !named.contains(&o.uid))
                    .cloned()
                    .collect();
                gone.iter().flat_map(|o| self.delete(o, at)).collect()
            }
            watcher::Event::Apply(object) => self.apply(object, at),
            watcher::Event::Delete(object) => self.delete(&object, at),
        }
    }

    fn apply(&mut self, object: Object, at: UnixNanos) -> Vec<Event> {
        let told = events(self.objects.get(&object.uid), Some(&object), at);
        self.objects.insert(object.uid.clone(), object);
        told
    }

    fn delete(&mut self, object: &Object, at: UnixNanos) -> Vec<Event> {
        let before = self.objects.remove(&object.uid);
        before.map_or_else(Vec::new, |before| events(Some(&before), None, at))
    }
}

/// Follows a cluster until that is no longer possible; says why then.
pub async fn follow(cluster: &Cluster, outlet: &mut Outlet) -> String {
    match client(cluster).await {
        Ok(client) => {
            follow_with(client, cluster, outlet).await;
            "the watch ended".to_owned()
        }
        Err(why) => why,
    }
}

async fn client(cluster: &Cluster) -> Result<Client, String> {
    let config = match &cluster.kubeconfig {
        Some(path) => {
            let read = Kubeconfig::read_from(path).map_err(|e| e.to_string())?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
                .await
                .map_err(|e| e.to_string())
        }
        // Inside of a cluster, or the user's own.
        None => Config::infer().await.map_err(|e| e.to_string()),
    };
    config
        .and_then(|config| Client::try_from(config).map_err(|e| e.to_string()))
        .map_err(|why| format!("Kubernetes: {why}"))
}

type Watched = BoxStream<'static, (&'static str, watcher::Result<watcher::Event<Object>>)>;

fn watch<K>(what: &'static str, api: Api<K>, config: watcher::Config) -> Watched
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
    Object: From<K>,
{
    let said = watcher(api, config).default_backoff();
    said.map(move |event| (what, event.map(|event| mapped(event))))
        .boxed()
}

fn mapped<K>(event: watcher::Event<K>) -> watcher::Event<Object>
where
    Object: From<K>,
{
    use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
    match event {
        Apply(object) => Apply(object.into()),
        Delete(object) => Delete(object.into()),
        Init => Init,
        InitApply(object) => InitApply(object.into()),
        InitDone => InitDone,
    }
}

/// The same with a client that there is.
pub async fn follow_with(client: Client, cluster: &Cluster, outlet: &mut Outlet) {
    let mut watches = Vec::new();
    let namespaces: Vec<Option<&str>> = match cluster.namespaces.is_empty() {
        true => vec![None],
        false => cluster
            .namespaces
            .iter()
            .map(|n| Some(n.as_str()))
            .collect(),
    };
    let config = watcher::Config::default();
    let on_node = config
        .clone()
        .fields(&format!("spec.nodeName={}", cluster.node));
    let mut seen: Vec<Seen> = namespaces.iter().map(|_| Seen::default()).collect();
    for (number, namespace) in namespaces.into_iter().enumerate() {
        let client = client.clone();
        let (deployments, sets, pods) = match namespace {
            Some(n) => (
                Api::<Deployment>::namespaced(client.clone(), n),
                Api::<StatefulSet>::namespaced(client.clone(), n),
                Api::<Pod>::namespaced(client, n),
            ),
            None => (
                Api::all(client.clone()),
                Api::all(client.clone()),
                Api::all(client),
            ),
        };
        for watch in [
            watch("deployment", deployments, config.clone()),
            watch("statefulset", sets, config.clone()),
            watch("pod", pods, on_node.clone()),
        ] {
            watches.push(watch.map(move |said| (number, said)).boxed());
        }
    }
    let mut all = stream::select_all(watches);
    while let Some((number, (what, said))) = all.next().await {
        let said = match said {
            Ok(said) => said,
            Err(error) => {
                tracing::warn!(%error, "the watch of {what}s; it goes on after a while");
                continue;
            }
        };
        for event in seen[number].take(what, said, outlet.now()) {
            if let Err(error) = outlet.publish(event).await {
                tracing::warn!(%error, "an event of Kubernetes could not be kept");
            }
        }
    }
}

#[cfg(test)]
mod tests;
