"""UCX by ucxx: shared memory on one host, RDMA or TCP between hosts, cuda_ipc between CUDA memories.

`worker.py` has a UCX worker and its pending requests, `endpoint.py` the connection to one process, `identity.py` the
identity of that process. `self_probe.py` detects that messages no longer reach this process. `transport.py` uses them
all.

What the code relies on (each was observed with ucxx 0.52 and UCX 1.21):
- Endpoints with error handling use TCP even on one host unless `MM_ERROR_HANDLING=y`. So that is set, and `Peer.route`
  is read from the endpoint, not from the settings.
- Shared memory does not notice that a peer was killed. So a peer of the same host and PID namespace is watched by a
  pidfd, others by UCX (TCP resets, keep-alive).
- A peer that is killed during a send may leave the receiver's queue blocked for all others: see `self_probe.py`.
- A single receive cannot be cancelled. So the worker sends itself a message with that tag that is longer than the
  buffer: the receive ends as truncated, and nothing is written. When the real message comes first, the other one is
  found later and dropped.
- ucxx reports a message that was longer than its buffer, but not its size. It does not report a shorter message.
- Destroying a worker fetches unexpected messages, and waits for their senders for ever if they are gone. So `close`
  drops them first. It runs at the latest when the process ends or the transport is garbage-collected.
- `import ucxx` sets `UCX_RNDV_THRESH=8192` for the process and its children. `load_ucxx` removes that.
- Making an endpoint over TCP blocks the process until the peer's host answers, unless `TCP_CONN_NB=y`. That takes two
  minutes if its answers are lost.
- The descriptor of a worker stays readable while a TCP peer has not accepted. Sleeping on it would spin.
- A request does not keep its buffer alive, and an endpoint that failed must not be closed again (it would crash).
"""
