# The PyTorch twin on NVIDIA GPUs. The wheel brings its CUDA libraries; the host needs the driver and its container toolkit.
#   docker build -f deploy/docker/gpu.Dockerfile -t telechat-twins:gpu .
#   docker run --rm -it --gpus all --shm-size 16g -v "$PWD/runs:/runs" telechat-twins:gpu tele doctor
FROM python:3.11-slim-bookworm

# Triton compiles a small helper with the system's compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /telechat-twins
COPY . .
RUN pip install --no-cache-dir -c requirements.lock -e '.[pt,serve,data,tokenizers]'
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["tele", "doctor"]
