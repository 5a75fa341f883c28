# One image for every service: `stagemesh coordinator|stage|gateway|serve`. Needs BuildKit (the default builder).
#
#   docker build -t stagemesh:0.3.0 .
#
# PyPI's PyTorch for Linux brings CUDA along. For a smaller image without it, or for another CUDA, name PyTorch's own
# index for the platform with --build-arg PIP_EXTRA_INDEX_URL=...; --build-arg CONSTRAINTS= leaves the pins out.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG EXTRAS=ucx-cu12
ARG CONSTRAINTS=constraints.txt
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/stagemesh
# For the CPU's kernels; without a compiler the wheel would leave them out.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# What stagemesh needs comes first, in a layer that lasts until pyproject.toml or the pins change.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    extras = [e for e in sys.argv[1].split(",") if e]; \
    print(*p["dependencies"], *(d for e in extras for d in p["optional-dependencies"][e]), sep="\n")' "${EXTRAS}" \
    > requirements.txt \
    && /opt/stagemesh/bin/pip install ${CONSTRAINTS:+--constraint "${CONSTRAINTS}"} --requirement requirements.txt
COPY README.md LICENSE ./
COPY protos protos
COPY coordinator coordinator
COPY gateway gateway
COPY stage_worker stage_worker
COPY stagemesh stagemesh
RUN python -m pip wheel --no-deps --wheel-dir dist . \
    && /opt/stagemesh/bin/pip install --no-deps dist/stagemesh-*.whl \
    && /opt/stagemesh/bin/pip check

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 stagemesh && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp stagemesh
COPY --from=build /opt/stagemesh /opt/stagemesh
ENV PATH=/opt/stagemesh/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000 50050 50051 50052
ENTRYPOINT ["stagemesh"]
CMD ["--help"]
