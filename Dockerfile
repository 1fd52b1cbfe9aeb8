# The image of `launch.gke`: docker build --build-arg EXTRA=tpu -t IMAGE . && docker push IMAGE   (EXTRA: tpu or cuda13)
FROM python:3.12-slim
ARG EXTRA=tpu
WORKDIR /meshwork
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e ".[${EXTRA},gcs,sweep,postgres]"
