# The MindSpore twin on Ascend NPUs (Atlas 800T A2). NOT RUN: no such machine was at hand; written from the published
# pairing of MindSpore 2.9.0 with CANN 9.0.0 and driver 26.0.RC1 (installation page of MindSpore Transformers 1.9.0).
#   docker build -f deploy/docker/ascend.Dockerfile -t telechat-twins:ascend .
#   docker run --rm -it --ipc host --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm \
#     --device /dev/hisi_hdc -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro \
#     -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro -v "$PWD/runs:/runs" telechat-twins:ascend tele doctor
# For an Atlas 900 A3 give --build-arg CANN=9.0.0-a3-ubuntu22.04-py3.11.
ARG CANN=9.0.0-910b-ubuntu22.04-py3.11
FROM quay.io/ascend/cann:${CANN}

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /telechat-twins
COPY . .
RUN python3 -m pip install --no-cache-dir -c requirements.lock -e '.[ms,serve,data,tokenizers]'
# The variables of CANN, for every command that is started in the container.
ENTRYPOINT ["bash", "-c", "source /usr/local/Ascend/ascend-toolkit/set_env.sh && exec \"$@\"", "--"]
CMD ["tele", "doctor"]
