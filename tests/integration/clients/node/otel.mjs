// node otel.mjs PORT COUNT PAUSE BAD: COUNT records, one each PAUSE ms, the one numbered BAD malformed.
// The last line printed is how many records the exporter told the SDK that it has given up.
import { SeverityNumber } from '@opentelemetry/api-logs';
import { OTLPLogExporter } from '@opentelemetry/exporter-logs-otlp-http';
import { resourceFromAttributes } from '@opentelemetry/resources';
import { BatchLogRecordProcessor, LoggerProvider } from '@opentelemetry/sdk-logs';

const [port, count, pause, bad] = process.argv.slice(2).map(Number);
const exporter = new OTLPLogExporter({ url: `http://127.0.0.1:${port}/v1/logs`, timeoutMillis: 60000 });
let lost = 0;
const told = {
  export: (records, done) => exporter.export(records, (result) => {
    if (result.code !== 0) lost += records.length;
    done(result);
  }),
  forceFlush: () => exporter.forceFlush(),
  shutdown: () => exporter.shutdown(),
};
const provider = new LoggerProvider({
  resource: resourceFromAttributes({ 'service.name': 'otel-javascript' }),
  processors: [
    new BatchLogRecordProcessor({
      exporter: told, maxExportBatchSize: 50, scheduledDelayMillis: 200, exportTimeoutMillis: 60000, maxQueueSize: 10000,
    }),
  ],
});
const logger = provider.getLogger('app');
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
for (let n = 0; n < count; n++) {
  const record = { severityNumber: SeverityNumber.INFO, body: 'record', attributes: { n } };
  if (n === bad) record.timestamp = new Date('2999-01-01T00:00:00Z');
  logger.emit(record);
  await sleep(pause);
}
await provider.forceFlush();
await provider.shutdown();
console.log(lost);
