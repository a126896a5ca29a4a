# The server of this repository. On CPUs:
#     docker build -t gpu-serving-labs:0.1.0 .
#     docker run -p 8000:8000 gpu-serving-labs:0.1.0
# On NVIDIA GPUs, with the CUDA version of a PyTorch build as DEVICE:
#     docker build -t gpu-serving-labs:0.1.0-cuda --build-arg DEVICE=cu130 .
#     docker run --gpus all -p 8000:8000 gpu-serving-labs:0.1.0-cuda

ARG PYTHON=3.11

# What is installed, in a virtual environment that the image below takes over.
FROM python:${PYTHON}-slim-bookworm AS packages
ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
# What torch itself needs comes with the rest, from the usual index.
RUN pip install --no-deps --index-url "https://download.pytorch.org/whl/${DEVICE}" \
        "$(grep '^torch==' constraints.txt)"
COPY kernels kernels
COPY course_lib course_lib
# Editable, as the package finds `data` beside itself.
RUN pip install -c constraints.txt -e ".[serve]"

FROM python:${PYTHON}-slim-bookworm
# On a CPU the engine compiles its kernels for that very CPU; on a GPU, Triton builds its launchers.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends g++ libc6-dev && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 10001 --create-home server
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY --from=packages /app /app
COPY data/models data/models
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# A number: Kubernetes' runAsNonRoot knows no names.
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=180s --retries=4 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=9)"]
ENTRYPOINT ["course"]
CMD ["serve", "--model=/app/data/models/merchant-chat", "--host=0.0.0.0", "--port=8000"]
