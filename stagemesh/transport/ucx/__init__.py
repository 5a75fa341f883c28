"""UCX by ucxx: shared memory on one host, RDMA or TCP between hosts, cuda_ipc between CUDA memories.

`worker.py` is what UCX calls a worker with what is under way on it; `endpoint.py` a way to one process, `identity.py`
which process that is; `self_probe.py` finds out that this process hears nothing; `transport.py` puts them together.

What had to be known (each was seen here, ucxx 0.52 with UCX 1.21):
- Endpoints with error handling take TCP even on one host unless `MM_ERROR_HANDLING=y`: so that is set, and
  `Peer.route` is read from the endpoint, not from the settings.
- Shared memory does not notice that a peer was killed. A peer of the same host and PID namespace is therefore watched
  by a pidfd; others by UCX (TCP resets, keep-alive).
- One that is killed in the midst of a send may leave the receiver deaf to all others: see `self_probe.py`.
- A receive cannot be cancelled alone: a message to oneself under its tag, longer than its buffer, ends it as truncated
  and writes nothing, unless the real message was first; then the late one is found again and dropped.
- ucxx tells when a message was longer than its buffer, but neither its size nor that it was shorter.
- Destroying a worker fetches what nobody took, and waits for its senders for ever if they are gone: so `close` drops it
  first, and runs at the latest when the process ends or the transport is garbage.
- `import ucxx` sets `UCX_RNDV_THRESH=8192` for the process and its children: that is taken back.
- An endpoint over TCP waits, and with it the process, until the peer's host answers, unless `TCP_CONN_NB=y`: for two
  minutes where its answers are lost on their way.
- The descriptor of a worker stays readable while a TCP peer has not accepted yet: sleeping on it would be a spin.
- A request does not keep its buffer alive, and an endpoint that failed must not be closed again (it would crash).
"""
