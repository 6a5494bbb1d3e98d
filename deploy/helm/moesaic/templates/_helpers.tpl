{{- define "moesaic.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 28 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 28 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 28 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "moesaic.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "moesaic.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* What all pods of a service have: (dict "root" $ "component" "router") */}}
{{- define "moesaic.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "moesaic.labels" -}}
{{ include "moesaic.selector" . }}
app.kubernetes.io/part-of: moesaic
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "moesaic.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .user }}
runAsGroup: {{ .user }}
fsGroup: {{ .user }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "moesaic.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "moesaic.spread" -}}
{{- if .root.Values.topologySpread.enabled }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ .root.Values.topologySpread.topologyKey }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "moesaic.selector" . | nindent 8 }}
{{- end }}
{{- end -}}

{{/* The URL of Redis or NATS as a variable: (dict "root" $ "variable" "REDIS_URL" "name" "redis" "port" 6379) */}}
{{- define "moesaic.server" -}}
{{- $values := index .root.Values .name -}}
- name: {{ .variable }}
{{- if $values.enabled }}
  value: {{ printf "%s://%s-%s:%d" .name (include "moesaic.fullname" .root) .name (int .port) }}
{{- else if $values.existingSecret }}
  valueFrom:
    secretKeyRef: {name: {{ $values.existingSecret }}, key: {{ $values.existingSecretKey }}}
{{- else }}
  value: {{ required (printf "set %s.url or %s.existingSecret, or %s.enabled: true" .name .name .name) $values.url | quote }}
{{- end }}
{{- end -}}

{{/*
The pod of a service: (dict "root" $ "component" "router" "section" "ROUTER" "port" 9010 "values" .Values.router
"env" TEXT "mounts" TEXT "volumes" TEXT "ports" TEXT "linger" SECONDS), where all from env on may be left out.
*/}}
{{- define "moesaic.pod" -}}
{{- $root := .root -}}
{{- $any := ternary "[::]" "0.0.0.0" $root.Values.ipv6 -}}
{{- $host := ternary "[$(POD_IP)]" "$(POD_IP)" $root.Values.ipv6 -}}
{{- $hasModel := and $root.Values.model.existingClaim (has .component (list "gateway" "scheduler" "expert-shard")) -}}
metadata:
  labels:
    {{- include "moesaic.labels" . | nindent 4 }}
  {{- with $root.Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "moesaic.serviceAccount" $root }}
  automountServiceAccountToken: false
  # they find each other by Redis
  enableServiceLinks: false
  # longer than what the drain may take, so that nothing is cut off
  terminationGracePeriodSeconds: {{ add .values.drainSeconds (.linger | default 0) 15 }}
  securityContext:
    {{- include "moesaic.podSecurity" (dict "user" 10001) | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $root.Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- include "moesaic.spread" . | nindent 2 }}
  containers:
    - name: {{ .component }}
      image: {{ printf "%s:%s" $root.Values.image.repository ($root.Values.image.tag | default $root.Chart.AppVersion) | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: {{ .command | default (list (printf "moesaic-%s" .component)) | toJson }}
      env:
        - name: POD_IP
          valueFrom:
            fieldRef: {fieldPath: status.podIP}
        - name: MOESAIC__CLUSTER__ID
          valueFrom:
            fieldRef: {fieldPath: metadata.name}
        - name: MOESAIC__CLUSTER__ADVERTISE
          value: {{ printf "http://%s:%d" $host (int .port) | quote }}
        - name: MOESAIC__{{ .section }}__GRPC
          value: {{ printf "%s:%d" $any (int .port) | quote }}
        - name: MOESAIC__{{ .section }}__DRAIN_TIMEOUT
          value: {{ printf "%ds" (int .values.drainSeconds) }}
        {{- include "moesaic.server" (dict "root" $root "variable" "REDIS_URL" "name" "redis" "port" 6379) | nindent 8 }}
        {{- include "moesaic.server" (dict "root" $root "variable" "NATS_URL" "name" "nats" "port" 4222) | nindent 8 }}
        - name: MOESAIC__TELEMETRY__LOG_FORMAT
          value: {{ $root.Values.telemetry.logFormat }}
        {{- with $root.Values.telemetry.otlpEndpoint }}
        - name: OTEL_EXPORTER_OTLP_ENDPOINT
          value: {{ . | quote }}
        {{- end }}
        {{- with $root.Values.model.path }}
        - name: MOESAIC__MODEL__PATH
          value: {{ . | quote }}
        {{- end }}
        {{- with .env }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- $taken := include "moesaic.taken" $root | fromYamlArray }}
        {{- range $key, $value := $root.Values.config }}
        {{- if has $key $taken }}
        {{- fail (printf "config: the chart itself sets %s, by another value" $key) }}
        {{- end }}
        - name: MOESAIC__{{ $key | replace "." "__" | upper }}
          {{- /* whole numbers come as floats, which would be printed as 2e+06 */}}
          {{- if and (kindIs "float64" $value) (eq $value (floor $value)) }}
          value: {{ $value | int64 | toString | quote }}
          {{- else }}
          value: {{ $value | toString | quote }}
          {{- end }}
        {{- end }}
      ports:
        - {name: grpc, containerPort: {{ .port }}}
        - {name: admin, containerPort: {{ add .port 1000 }}}
        {{- with .ports }}
        {{- . | nindent 8 }}
        {{- end }}
      # an answer of 503 says why; it is live while it loads its model
      readinessProbe:
        httpGet: {path: /ready, port: admin}
        periodSeconds: 2
        timeoutSeconds: 5
        failureThreshold: 2
      livenessProbe:
        httpGet: {path: /live, port: admin}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      {{- with .linger }}
      # until no new connections are sent here
      lifecycle:
        preStop:
          exec: {command: [sleep, {{ . | quote }}]}
      {{- end }}
      resources:
        {{- toYaml .values.resources | nindent 8 }}
      securityContext:
        {{- include "moesaic.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- if $hasModel }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- with .mounts }}
        {{- . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    {{- if $hasModel }}
    - name: models
      persistentVolumeClaim: {claimName: {{ $root.Values.model.existingClaim }}, readOnly: true}
    {{- end }}
    {{- with .volumes }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* The service that names the pods of a stateful set; they find each other by Redis. */}}
{{- define "moesaic.headless" }}
apiVersion: v1
kind: Service
metadata:
  name: {{ .name }}
  labels:
    {{- include "moesaic.labels" . | nindent 4 }}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    {{- include "moesaic.selector" . | nindent 4 }}
  ports:
    - {name: grpc, port: {{ .port }}, targetPort: grpc, appProtocol: grpc}
{{- end -}}

{{/* Redis or NATS: (dict "root" $ "component" "redis" "port" 6379 "command" LIST "probe" MAP "user" 999) */}}
{{- define "moesaic.serverObjects" }}
{{- $values := index .root.Values .component }}
{{- $name := printf "%s-%s" (include "moesaic.fullname" .root) .component }}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  labels:
    {{- include "moesaic.labels" . | nindent 4 }}
spec:
  replicas: 1
  # two would not know of each other
  strategy: {type: Recreate}
  selector:
    matchLabels:
      {{- include "moesaic.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "moesaic.labels" . | nindent 8 }}
    spec:
      serviceAccountName: {{ include "moesaic.serviceAccount" .root }}
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 15
      securityContext:
        {{- include "moesaic.podSecurity" . | nindent 8 }}
      containers:
        - name: {{ .component }}
          image: {{ $values.image | quote }}
          command: {{ toJson .command }}
          ports:
            - {name: {{ .component }}, containerPort: {{ .port }}}
          readinessProbe:
            {{- toYaml .probe | nindent 12 }}
            periodSeconds: 2
            timeoutSeconds: 5
          livenessProbe:
            {{- toYaml .probe | nindent 12 }}
            periodSeconds: 10
            timeoutSeconds: 5
          resources:
            {{- toYaml $values.resources | nindent 12 }}
          securityContext:
            {{- include "moesaic.containerSecurity" . | nindent 12 }}
          volumeMounts:
            - {name: data, mountPath: /data}
      volumes:
        - name: data
          emptyDir: {}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  labels:
    {{- include "moesaic.labels" . | nindent 4 }}
spec:
  selector:
    {{- include "moesaic.selector" . | nindent 4 }}
  ports:
    - {name: {{ .component }}, port: {{ .port }}, targetPort: {{ .component }}}
{{- end -}}

{{/* As many threads as cores are asked for; all of the node's where none are. */}}
{{- define "moesaic.threads" -}}
- name: MOESAIC__MODEL__THREADS
  valueFrom:
    resourceFieldRef: {resource: requests.cpu}
{{- end -}}

{{/* Settings that the chart makes of other values. */}}
{{- define "moesaic.taken" -}}
- model.path
- cluster.id
- cluster.advertise
- cluster.redis_url
- cluster.nats_url
- telemetry.log_format
- telemetry.otlp_endpoint
- gateway.grpc
- gateway.http
- gateway.drain_timeout
- gateway.salt_secret
- router.grpc
- router.drain_timeout
- router.placement.min_groups
- router.placement.min_copies
- scheduler.grpc
- scheduler.drain_timeout
- scheduler.experts
- scheduler.kv_memory_bytes
- expert_shard.grpc
- expert_shard.drain_timeout
- expert_shard.group
- expert_shard.rank
- expert_shard.ranks
- kv_store.grpc
- kv_store.drain_timeout
- kv_store.capacity
- kv_store.replication
- kv_store.disk_folder
- kv_store.disk_capacity
- model.threads
{{- end -}}
