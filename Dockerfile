# progrpo in an image. On a CPU: docker build -t progrpo .
# On NVIDIA GPUs (with the NVIDIA Container Toolkit): docker build -t progrpo --build-arg DEVICE=cuda .
#
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" progrpo train quickstart --out runs/quickstart
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" -v "$HOME/.cache/huggingface:/cache/huggingface" \
#       --user "$(id -u):$(id -g)" progrpo train sd35m-pickscore
ARG DEVICE=cpu

FROM python:3.12-slim-bookworm AS cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

# torch's wheels bring CUDA; the driver is the host's. Triton compiles kernels with a C compiler and Python's headers.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04 AS cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV TORCH_INDEX=https://pypi.org/simple

FROM ${DEVICE}
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/cache/huggingface \
    HOME=/tmp
RUN python3 -m venv /opt/venv
WORKDIR /opt/progrpo
COPY constraints.txt ./
RUN pip install -c constraints.txt --extra-index-url "$TORCH_INDEX" torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install -c constraints.txt '.[server,tensorboard,datasets]' \
    && mkdir -p /work /cache/huggingface && chmod 1777 /work /cache /cache/huggingface \
    && useradd --uid 10001 --no-create-home progrpo
USER 10001
WORKDIR /work
ENTRYPOINT ["progrpo"]
CMD ["--help"]
