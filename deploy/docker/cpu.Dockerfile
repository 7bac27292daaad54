# Both twins on CPUs, for tests, conversion and small models.
#   docker build -f deploy/docker/cpu.Dockerfile -t telechat-twins:cpu .
#   docker run --rm -it --shm-size 2g -v "$PWD/runs:/runs" telechat-twins:cpu tele demo --out /runs/demo
FROM python:3.11-slim-bookworm

# g++ compiles the C++ operators at their first use; make runs the tests.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /telechat-twins
COPY . .
# PyTorch's own index has builds without CUDA (200 MB in place of 3 GB).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c requirements.lock -e '.[ms,pt,serve,data,tokenizers]' \
    && python -m telechat_twins.kernels.cpu.build
ENV OMP_WAIT_POLICY=PASSIVE
CMD ["tele", "doctor"]
