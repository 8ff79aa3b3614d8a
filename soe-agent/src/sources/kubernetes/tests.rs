//! Against a mocked API server: it answers lists and watches as the documentation of the API says, from
//! objects written here. No cluster was at hand to record one.

use super::super::support::Taken;
use super::*;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use std::sync::Arc;
use std::time::Duration;

fn deployment(version: u32, replicas: i32, image: &str) -> serde_json::Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "shop", "uid": "d1", "resourceVersion": version.to_string()},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "web", "image": image}]},
            },
        },
    })
}

fn pod(version: u32, phase: &str) -> serde_json::Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "web-7d4-abcde", "namespace": "shop", "uid": "p1", "resourceVersion": version.to_string(),
            "labels": {"pod-template-hash": "7d4"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-7d4", "uid": "r1"}],
        },
        "spec": {"nodeName": "here", "containers": [{"name": "web", "image": "a"}]},
        "status": {"phase": phase},
    })
}

/// Lists what is there first, then streams what is said, one JSON object a line.
fn answer(uri: &axum::http::Uri) -> Response {
    let query = uri.query().unwrap_or_default().to_owned();
    let watch = query.contains("watch=true") || query.contains("watch=1");
    let (kind, api, items, said) = match uri.path() {
        path if path.ends_with("/deployments") => (
            "DeploymentList",
            "apps/v1",
            vec![deployment(1, 2, "web:1")],
            vec![
                ("MODIFIED", deployment(5, 2, "web:2")),
                ("MODIFIED", deployment(6, 6, "web:2")),
                ("DELETED", deployment(7, 6, "web:2")),
            ],
        ),
        path if path.ends_with("/pods") => {
            assert!(query.contains("fieldSelector=spec.nodeName"), "{query}");
            let said = vec![
                ("ADDED", pod(5, "Pending")),
                ("MODIFIED", pod(6, "Running")),
                ("DELETED", pod(7, "Running")),
            ];
            ("PodList", "v1", Vec::new(), said)
        }
        _ => ("StatefulSetList", "apps/v1", Vec::new(), Vec::new()),
    };
    if !watch {
        let list = json!({
            "kind": kind, "apiVersion": api, "metadata": {"resourceVersion": "4"}, "items": items,
        });
        return Response::new(Body::from(list.to_string()));
    }
    // A second watch goes on where the first ended: nothing is new there.
    let lines = if query.contains("resourceVersion=4") {
        said
    } else {
        Vec::new()
    };
    let lines = stream::iter(lines).map(|(kind, object)| {
        let line = json!({"type": kind, "object": object});
        Ok::<_, std::io::Error>(format!("{line}\n"))
    });
    let open = stream::pending::<Result<String, std::io::Error>>();
    Response::new(Body::from_stream(lines.chain(open)))
}

#[test]
fn what_a_cluster_does_is_told() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let events = runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app =
            axum::Router::new().fallback(|request: Request| async move { answer(request.uri()) });
        let server = tokio::spawn(async move { axum::serve(listener, app).await });
        let client = Client::try_from(Config::new(format!("http://{address}").parse().unwrap()));
        let cluster = Cluster {
            kubeconfig: None,
            namespaces: vec!["shop".into()],
            node: "here".into(),
        };
        let taken = Arc::new(Taken::default());
        let told = taken.clone();
        let following = tokio::spawn(async move {
            follow_with(client.unwrap(), &cluster, &mut Outlet::new(told)).await;
        });
        for _ in 0..500 {
            if taken.events.lock().unwrap().len() >= 5 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        following.abort();
        server.abort();
        taken.events.lock().unwrap().clone()
    });
    let mut told: Vec<(String, String)> = events
        .iter()
        .map(|e| (e.kind.clone(), e.subject.clone().unwrap_or_default()))
        .collect();
    told.sort();
    let web = |kind: &str| (format!("io.kubernetes.{kind}"), "shop/web".to_owned());
    assert_eq!(
        told,
        [
            web("deployment.deleted"),
            web("deployment.rollout"),
            web("deployment.scaled"),
            web("pod.started"),
            web("pod.stopped"),
        ]
    );
    let scaled = events.iter().find(|e| e.kind.ends_with("scaled")).unwrap();
    assert_eq!(scaled.data, Some(json!({"from": 2, "to": 6})));
}

#[test]
fn what_a_list_no_longer_names_is_gone_and_what_is_there_at_first_is_not_new() {
    let object = |uid: &str| Object {
        uid: uid.to_owned(),
        ..base("deployment", &ObjectMeta::default())
    };
    let mut seen = Seen::default();
    let mut take = |said| seen.take("deployment", said, 0);
    assert!(take(watcher::Event::Init).is_empty());
    assert!(take(watcher::Event::InitApply(object("a"))).is_empty());
    assert!(take(watcher::Event::InitDone).is_empty());
    // The watch broke; b came and a went meanwhile.
    assert!(take(watcher::Event::Init).is_empty());
    let came = take(watcher::Event::InitApply(object("b")));
    let went = take(watcher::Event::InitDone);
    assert!(came[0].kind.ends_with("created") && came.len() == 1);
    assert!(went[0].kind.ends_with("deleted") && went.len() == 1);
}
