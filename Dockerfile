# syntax=docker/dockerfile:1
# A service in a container: on a CPU, or on NVIDIA's GPUs with vLLM.
#
#     docker build -t coe .
#     docker build -t coe-cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg TORCH=auto --build-arg EXTRA=vllm .
#
# How to run it: docs/serving.md, "In a container".
ARG BASE=debian:bookworm-slim
ARG UV=ghcr.io/astral-sh/uv:0.9

FROM ${UV} AS uv

FROM ${BASE}
ARG TORCH=cpu
ARG EXTRA=train
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# vLLM compiles kernels at its first start: it needs a compiler.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends ca-certificates build-essential \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --create-home --uid 10001 coe

COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_LINK_MODE=copy PATH=/opt/coe/bin:$PATH

# The dependencies first: they change seldom, and take minutes.
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN --mount=type=cache,target=/root/.cache/uv \
  uv venv --python 3.11 /opt/coe \
  && VIRTUAL_ENV=/opt/coe uv pip install --torch-backend "${TORCH}" -c constraints.txt -r pyproject.toml \
     --extra "${EXTRA}"
COPY coe coe
COPY routers routers
COPY registry registry
RUN VIRTUAL_ENV=/opt/coe uv pip install --no-deps .

USER 10001
WORKDIR /config
ENV COE_HOME=/home/coe/.cache/coe RAY_USAGE_STATS_ENABLED=0
VOLUME ["/home/coe/.cache/coe"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["coe"]
CMD ["serve", "--config", "/config/coe.yaml", "--host", "0.0.0.0"]
